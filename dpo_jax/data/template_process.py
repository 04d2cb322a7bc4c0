"""The process in which chat templates run, started by `rendering.py`; nothing of dpo_jax is imported.

A template is a program by the author of a model. Whatever it does, it does here: a job that takes too long ends the
process (SIGPROF), memory ends with a MemoryError, and all that comes back is JSON on the pipe that was standard output.
"""

import contextlib
import json
import os
import pickle
import resource
import signal
import sys

MEMORY = 1 << 30  # bytes of addresses beyond what the process has when it is ready
OUTPUT, OUTPUT_PER_BYTE = 1 << 20, 16  # characters of a text: so many, and so many more for each byte of its job


def serve(seconds: float) -> None:
    """Answer requests, each a list of jobs, until standard input ends; a job may take so many seconds of the CPU.

    A request is the length of a pickle and the pickle: jobs are keyword arguments of `apply_chat_template` and the
    special tokens that a template may name. Every job is answered by a length and a JSON list: ["text", text],
    ["error", kind, message] or ["limit", what].
    """
    replies = os.dup(1)  # without a buffer: what was answered before a job ends the process has arrived
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    class Speaker(PreTrainedTokenizerBase):
        """A tokenizer that has nothing but special tokens."""

        chat_template = None

        def __init__(self, special: dict[str, str]):  # nothing of what makes a tokenizer
            self.special = special

        @property
        def special_tokens_map(self) -> dict[str, str]:
            return self.special

    with contextlib.suppress(FileNotFoundError):  # no Linux
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for limited in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limited, (0, 0))
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # for the process that asks, with which this one ends
        signal.signal(kind, signal.SIG_IGN)
    while head := sys.stdin.buffer.read(8):
        special, jobs = pickle.loads(sys.stdin.buffer.read(int.from_bytes(head, "little")))
        speaker = Speaker(special)
        for job, size in jobs:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                answer = _answer(speaker, job, OUTPUT + OUTPUT_PER_BYTE * size)
                text = json.dumps(answer).encode()
            except MemoryError:
                text = b'["limit", "memory"]'
            signal.setitimer(signal.ITIMER_PROF, 0)
            _write(replies, len(text).to_bytes(8, "little") + text)


def _write(to: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(to, left) :]


def _answer(speaker: object, job: dict[str, object], most: int) -> list[str]:
    try:
        text = speaker.apply_chat_template(tokenize=False, **job)  # type: ignore[attr-defined]
    except MemoryError:
        raise
    except Exception as error:  # templates are programs: they refuse in any way that a program can
        return ["error", type(error).__name__, str(error)[:10_000]]
    return ["limit", "output"] if len(text) > most else ["text", text]


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        serve(float(sys.argv[1]))
