"""Chat templates are rendered in a process of their own, within limits of time, memory and output.

A template is a program that comes with a model. transformers renders it in Jinja's sandbox, which keeps it from files
and from Python's insides, but not from loops without an end or a text that fills the memory. No check of its source can
tell; so it runs where it can be stopped.
"""

import atexit
import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError

SECONDS = 2.0  # of the CPU, for one conversation
_SILENCE = 120.0  # seconds without a word of the process, however busy the machine is
_LIMITS = {
    "time": "takes more than {} s for one conversation",
    "memory": "takes more than 1 GB of memory for one conversation",
    "output": "writes more than a million characters, and many times what it was given",
}
Job = Mapping[str, Any]  # what `apply_chat_template` is given


class TemplateRefusal(Exception):  # noqa: N818 (what a template says, of a conversation that it does not take)
    """What a template raised; `kind` is the name of the exception's class."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def render_jobs(tokenizer: Any, jobs: Sequence[Job]) -> list[str | TemplateRefusal]:
    """The text of every job, or why there is none.

    Args:
      tokenizer: a transformers tokenizer; its special tokens are all that a template may know of it.
      jobs: arguments of its `apply_chat_template`, with the source of the template as `chat_template`.

    Raises:
      UserError: the tokenizer's template does not keep the limits; a row's own is a refusal then.
    """
    if not jobs:
        return []
    held = tokenizer.chat_template
    sources = [text for text in (held.values() if isinstance(held, dict) else [held]) if text]
    own = lambda values: any(values["chat_template"].endswith(text) for text in sources)  # a date stands before it
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    texts: list[str | TemplateRefusal] = []
    with _LOCK:
        while len(texts) < len(jobs):
            for kind, *said in _process().ask(special, jobs[len(texts) :]):
                if kind == "limit":
                    words = _LIMITS.get(said[0], said[0]).format(SECONDS)
                    if own(jobs[len(texts)]):
                        where = source_file(tokenizer)
                        raise UserError(f"{where}: the chat template {words}; mend it, or give another one")
                    texts.append(TemplateRefusal("Limit", f"the chat template {words}"))  # that row's own
                else:
                    texts.append(_sound(said[0]) if kind == "text" else TemplateRefusal(*said))
    return texts


def _sound(text: str) -> str | TemplateRefusal:
    """A template's text; a refusal where it has half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.start + 1].encode("unicode_escape").decode()
        return TemplateRefusal("UnicodeEncodeError", f"it writes half a character ({half})")
    return text


def source_file(tokenizer: Any) -> str:
    """Where a tokenizer's chat template stands, for messages: a file, with the key where it holds others."""
    directory = Path(tokenizer.name_or_path)
    if (directory / "chat_template.jinja").is_file():
        return str(directory / "chat_template.jinja")
    name = "chat_template.json" if (directory / "chat_template.json").is_file() else "tokenizer_config.json"
    return f"{directory / name}: chat_template"


class _Process:
    """One process of `template_process.py`, and the pipes to it and from it."""

    def __init__(self) -> None:
        self.owner, self._held = os.getpid(), bytearray()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "USE_TORCH": "0",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-P", str(Path(__file__).with_name("template_process.py")), str(SECONDS)]
        pipe = subprocess.PIPE
        # A session of its own: a signal to all processes of a run is not for this one, whose end would be a refusal.
        self._run = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        assert self._run.stdin is not None
        assert self._run.stdout is not None
        self._to, self._from = self._run.stdin, self._run.stdout.fileno()

    def ask(self, special: Mapping[str, str], jobs: Sequence[Job]) -> list[list[str]]:
        """What the process answers to every job, up to one with which it ended: that limit is then the last answer."""
        request = pickle.dumps((dict(special), [(job, _size(job)) for job in jobs]))
        try:
            self._to.write(len(request).to_bytes(8, "little") + request)
            self._to.flush()
        except BrokenPipeError:
            return [["limit", self._end()]]
        except BaseException:  # half a request was sent
            self._end()
            raise
        answers: list[list[str]] = []
        try:
            for _ in jobs:
                length = int.from_bytes(self._read(8), "little")
                answers.append(json.loads(self._read(length)))
        except EOFError:
            answers.append(["limit", self._end()])
        except BaseException:  # a signal: answers that nobody has read would be taken for those to the next request
            self._end()
            raise
        return answers

    def alive(self) -> bool:
        return self.owner == os.getpid() and self._run.poll() is None

    def _read(self, size: int) -> bytes:
        waiting = select.poll()
        waiting.register(self._from, select.POLLIN)
        while len(self._held) < size:
            if not waiting.poll(1000 * _SILENCE):
                raise EOFError
            piece = os.read(self._from, 1 << 18)
            if not piece:
                raise EOFError
            self._held += piece
        wanted = bytes(self._held[:size])
        del self._held[:size]
        return wanted

    def _end(self) -> str:
        """End the process; returns what it ended of."""
        try:
            code = self._run.wait(1)
        except subprocess.TimeoutExpired:
            code = -signal.SIGPROF
        self.close()
        named = {-signal.SIGPROF: "time", -signal.SIGKILL: "memory"}  # the system kills where memory runs out
        return named.get(code, f"ends the process that renders it (code {code})")

    def close(self) -> None:
        if self.owner != os.getpid():
            return
        self._run.kill()
        self._run.wait()
        with contextlib.suppress(OSError):
            self._to.close()
        if self._run.stdout is not None:
            self._run.stdout.close()


_LOCK = threading.Lock()
_RUNNING: list[_Process] = []


def _process() -> _Process:
    """The process that renders, started when it is first needed and again after it was ended."""
    if _RUNNING and not _RUNNING[0].alive():
        _RUNNING.pop().close()
    if not _RUNNING:
        _RUNNING.append(_Process())
    return _RUNNING[0]


@atexit.register
def end_process() -> None:
    """End the process that renders, if one runs; the next template starts another."""
    while _RUNNING:
        _RUNNING.pop().close()


def _size(job: Job) -> int:
    """About how many characters a job's messages have."""
    return sum(len(str(value)) for message in job["conversation"] for value in message.values())
