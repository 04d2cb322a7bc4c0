"""The file of pairs, which is resumed; FILE.about.json beside it says what it is of and how far it has come. No JAX.

A prompt may give no pair or several, so the record holds how many prompts are done and how many bytes of the file are
theirs. Lines behind these belong to a block that was stopped; they are cut, and the block is drawn again, the same.
"""

import contextlib
import datetime
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dpo_jax.answering.found import Found, model_digest
from dpo_jax.answering.lines import BEGIN_ANEW, about_path, append_lines, held_lines, settle, writing_out, written_line
from dpo_jax.answering.output import check_same_work, resumed_memory
from dpo_jax.collecting.prompts import Surveyed
from dpo_jax.disk import read_json, write_json
from dpo_jax.errors import UserError
from dpo_jax.judging.kept import check_same_judge

_KEPT = ("model", "day", "devices", "memory", "done", "bytes", "sum", "counts", "seconds")  # of a record, as it began
_BLOCK = 1 << 20


class PairFile:
    """Where pairs are written.

    Attributes:
      path, about: the file, and its record.
      said: what is to be told of it.
    """

    def __init__(self, path: Path, about: dict[str, Any], file: IO[bytes], content: Any, said: Sequence[str] = ()):
        self.path, self.about, self._file, self._content, self.said = path, about, file, content, list(said)

    @property
    def done(self) -> int:
        """Prompts."""
        return int(self.about["done"])

    @property
    def is_finished(self) -> bool:
        return self.done == self.about["prompts"]

    def begin(self, devices: str, free: float) -> int:
        """Nothing is refused any more; MiB that keys and values may take, see `answering.output.Output.begin`."""
        memory = max(1, int(free) >> 20)
        if self.done:
            return resumed_memory(self.path, self.about, devices, memory)
        with writing_out(self.path):
            self.about |= {"devices": devices, "memory": memory}
            write_json(about_path(self.path), self.about)
            self._file.truncate(0)
        return memory

    def write(
        self, lines: Sequence[Mapping[str, Any]], prompts: int, counts: Mapping[str, int], seconds: Mapping[str, float]
    ) -> None:
        """Append the pairs of a block of so many prompts, and put them and the record on disk.

        Args:
          counts: of what was dropped and drawn, added to those of before.
          seconds: of wall time, by what took it.
        """
        text = "".join(map(written_line, lines))
        append_lines(self.path, self._file, text)
        settle(self.path, self._file)
        self._content.update(text.encode())
        self.about["done"] += prompts
        self.about["bytes"] += len(text.encode())
        self.about["sum"] = self._content.hexdigest()
        self.about["counts"] = dict(Counter(self.about["counts"]) + Counter(counts))
        for name, value in seconds.items():
            self.about["seconds"][name] = round(self.about["seconds"].get(name, 0.0) + value, 3)
        with writing_out(self.path):
            write_json(about_path(self.path), self.about)


def about_pairs(
    decides: Mapping[str, Any], found: Found, judge: Mapping[str, Any], surveyed: Surveyed
) -> dict[str, Any]:
    """What a file of pairs is begun with. A hub's model is downloaded for it."""
    return {
        "settings": dict(decides),
        "model": found.name,
        "model_files": model_digest(found),
        "judge": judge,
        "prompts": len(surveyed),
        "prompts_digest": surveyed.digest,
        "day": datetime.date.today().isoformat(),  # which a chat template may write
        "done": 0,
        "bytes": 0,
        "sum": "",
        "counts": dict(surveyed.dropped),
        "seconds": {},
    }


@contextlib.contextmanager
def opened_pairs(out: str, about: dict[str, Any], *, overwrite: bool) -> Iterator[PairFile]:
    """The file to go on with, held while in here.

    Raises:
      UserError: it was begun with something else, is no file of pairs, was changed, is in use, or cannot be written.
    """
    path = Path(out)
    before = None if overwrite or not about_path(path).exists() else read_json(about_path(path), BEGIN_ANEW)
    # A file without pairs stays, with its record, once prompts are done.
    with held_lines(path, empty_stays=lambda: _prompts_done(path) > 0) as held:
        with writing_out(path):
            anew = overwrite or (before is None and not path.stat().st_size)
            content = hashlib.blake2b(digest_size=12)
            file = PairFile(path, about, held, content) if anew else _resumed(path, held, about, before)
        yield file


def _prompts_done(path: Path) -> int:
    try:
        return int(read_json(about_path(path)).get("done", 0))
    except (UserError, OSError, TypeError, ValueError):
        return 0


def _resumed(path: Path, held: IO[bytes], about: dict[str, Any], record: dict[str, Any] | None) -> PairFile:
    if record is None:
        raise UserError(f"--out={path} is there, and no {about_path(path).name} says what it is of; {BEGIN_ANEW}")
    check_same_work(path, record, about)
    check_same_judge(path, record, about)
    about = about | {key: record[key] for key in _KEPT if key in record}
    size = path.stat().st_size
    content = hashlib.blake2b(digest_size=12)
    with path.open("rb") as file:
        left = about["bytes"]
        while left and (block := file.read(min(left, _BLOCK))):
            content.update(block)
            left -= len(block)
    if left or (about["bytes"] and content.hexdigest() != about["sum"]):
        raise UserError(f"--out={path} was changed since it was stopped; put it back, or {BEGIN_ANEW}")
    said = []
    if size > about["bytes"]:
        os.truncate(path, about["bytes"])
        said.append(f"{path}: {size - about['bytes']:,} bytes of a block that was stopped are cut")
    if about["done"]:
        said.append(f"{path}: {about['done']:,} of {about['prompts']:,} prompts are done")
    return PairFile(path, about, held, content, said)
