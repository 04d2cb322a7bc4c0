"""The file of answers: a line a prompt, in their order; what it was begun with; and how it is resumed. No JAX.

Beside OUT lies OUT.about.json: the settings, the model and the prompts that its lines are of.
"""

import contextlib
import datetime
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dpo_jax.answering.found import Found, model_digest
from dpo_jax.answering.lines import (
    BEGIN_ANEW,
    about_path,
    append_lines,
    cut_torn_line,
    held_lines,
    settle,
    writing_out,
    written_line,
)
from dpo_jax.data.prompts import Prompt, prompts_digest
from dpo_jax.disk import read_json, write_json
from dpo_jax.errors import UserError
from dpo_jax.sampling.params import Answer, SamplingParams

_SHARE = 0.8  # of what is free is said to be, so that the rest may be used where there was more before
_SHOWN = 4  # settings that a refusal names


class Output:
    """Where answers are written: a file that is resumed, or standard output.

    Attributes:
      about: what it was begun with.
      done: lines that were there when it was opened.
      said: what is to be told of it.
    """

    def __init__(
        self,
        path: Path | None,
        about: dict[str, Any],
        file: IO[bytes] | None = None,
        done: int = 0,
        said: Sequence[str] = (),
    ):
        self.path, self.about, self._file, self.done, self.said = path, about, file, done, list(said)

    @property
    def is_finished(self) -> bool:
        return self._file is not None and self.done == self.about["prompts"]

    def begin(self, devices: str, free: float) -> int:
        """Nothing is refused any more: answers are written from here on.

        Args:
          devices: on which, in words; other ones than before are told, as they round otherwise.
          free: bytes of a device that are free for keys and values.

        Returns:
          MiB that keys and values may take, which decide how many answers are drawn at once: as many as before.
        """
        memory = max(1, int(free) >> 20)
        if self.path is None or self._file is None:
            return memory
        if not self.done:
            with writing_out(self.path):
                self._file.truncate(0)
                write_json(about_path(self.path), self.about | {"devices": devices, "memory": memory})
            return memory
        return resumed_memory(self.path, self.about, devices, memory)

    def write(self, line: str) -> None:
        """Append a line; it is with the system when this returns."""
        if self.path is None or self._file is None:
            print(line, end="", flush=True)
            return
        append_lines(self.path, self._file, line)

    def settle(self) -> None:
        """Put what was written on disk."""
        if self.path is not None and self._file is not None:
            settle(self.path, self._file)


def resumed_memory(path: Path, about: Mapping[str, Any], devices: str, memory: int) -> int:
    """MiB for keys and values where a file is resumed: as many as it was begun with, if they are there."""
    record, before = about.get("devices", devices), int(about.get("memory", memory))
    if record != devices:
        tell(f"{path}: begun on {record}, resumed on {devices}: the last digits of numbers may differ")
    elif before > memory / _SHARE:
        tell(f"{path}: begun with {before:,} MiB free, resumed with {memory:,}: the last digits may differ")
    return memory if record != devices or before > memory / _SHARE else before


def about_answers(decides: Mapping[str, Any], found: Found, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a file of answers is begun with. A hub's model is downloaded for it."""
    return {
        "settings": dict(decides),
        "model": found.name,
        "model_files": model_digest(found),
        "prompts": len(prompts),
        "prompts_digest": prompts_digest(prompts),
        "day": datetime.date.today().isoformat(),  # which a chat template may write
    }


@contextlib.contextmanager
def opened(out: str, about: dict[str, Any], prompts: Sequence[Prompt], *, overwrite: bool) -> Iterator[Output]:
    """The file `out` to go on with, held while in here; standard output if it is empty.

    Raises:
      UserError: it was begun with something else, is no file of answers, is in use, or cannot be written.
    """
    if not out:
        yield Output(None, about)
        return
    path = Path(out)
    with held_lines(path) as held:
        with writing_out(path):
            output = Output(path, about, held) if overwrite else _resumed(path, held, about, prompts)
        yield output


def _resumed(path: Path, held: IO[bytes], about: dict[str, Any], prompts: Sequence[Prompt]) -> Output:
    size = path.stat().st_size
    if not size:
        return Output(path, about, held)
    beside = about_path(path)
    if not beside.exists():
        raise UserError(f"--out={path} is there, and no {beside.name} says what it is of; {BEGIN_ANEW}")
    record = read_json(beside, BEGIN_ANEW)
    check_same_work(path, record, about)
    # Names and days stay those that it was begun with.
    about = about | {key: record[key] for key in ("model", "day", "devices", "memory") if key in record}

    def check(at: int, line: bytes) -> None:
        if at == len(prompts) or not _is_of(line, prompts[at]):
            raise UserError(f"--out={path} line {at + 1} is no answer to the prompt of its place; {BEGIN_ANEW}")

    done, torn = cut_torn_line(path, check)
    said = []
    if torn:
        said.append(f"{path}: the last line was torn; its {torn:,} bytes are cut")
    if done:
        said.append(f"{path}: {done:,} of {len(prompts):,} prompts are answered")
    return Output(path, about, held, done, said)


def _is_of(line: bytes, prompt: Prompt) -> bool:
    try:
        held = json.loads(line)
    except ValueError:
        return False
    return isinstance(held, dict) and held.get("id") == prompt.name and "answers" in held


def check_same_work(path: Path, record: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse, with a UserError, a file that was begun with other settings, another model or other prompts."""
    there, here = record.get("settings") or {}, about["settings"]
    changed = [f"{key}: {there.get(key)!r} there, {here[key]!r} now" for key in here if there.get(key) != here[key]]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UserError(
            f"--out={path} was begun with other settings ({'; '.join(changed[:_SHOWN])}{more}); {BEGIN_ANEW}"
        )
    if record.get("model_files") != about["model_files"]:
        names = f"{record.get('model')!r} there, {about['model']!r} now"
        same = ": the same name, other files" if record.get("model") == about["model"] else ""
        raise UserError(f"--out={path} was begun with another model ({names}{same}); {BEGIN_ANEW}")
    if record.get("prompts_digest") != about["prompts_digest"]:
        counts = f"{record.get('prompts'):,} there, {about['prompts']:,} now"
        raise UserError(f"--out={path} was begun with other prompts ({counts}); {BEGIN_ANEW}")


def answer_line(prompt: Prompt, given: Any, answers: Sequence[Answer], model: str, asked: SamplingParams) -> str:
    """The line of a prompt with its answers."""
    line = {
        "id": prompt.name,
        "prompt": given,
        "answers": [_answer(answer, asked.logprobs) for answer in answers],
        "model": model,
        "seed": asked.seed,
    }
    return written_line(line | ({"round": asked.round} if asked.round else {}))


def _answer(answer: Answer, with_logprobs: bool) -> dict[str, Any]:
    held: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "logprob": _number(answer.logprob),
    }
    if with_logprobs:
        held |= {name: [_number(x) for x in getattr(answer, name)] for name in ("logprobs", "full_logprobs")}
    return held


def _number(value: float) -> float | None:
    """With the nine digits that a float32 has; None (JSON has no other word) where it is not finite."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def tell(text: str) -> None:
    """A line to a person, beside the answers."""
    print(text, file=sys.stderr, flush=True)
