"""The file that keeps what was judged, a line each, and is resumed: nothing that is in it is asked again. No JAX."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

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
from dpo_jax.disk import read_json, write_json
from dpo_jax.errors import UserError

Line = dict[str, Any]
Belongs = Callable[[int, Line], bool]  # whether a line is the one of its place
_SETTLE_SECONDS = 1.0  # between two times that lines are put on disk; with the system they are at once


class KeptLines:
    """Lines that are there, and where more go: to a file, or nowhere.

    Attributes:
      done: the lines that were there when it was opened.
      said: what is to be told of it.
    """

    def __init__(
        self,
        path: Path | None = None,
        about: Mapping[str, Any] | None = None,
        file: IO[bytes] | None = None,
        done: Sequence[Line] = (),
        said: Sequence[str] = (),
    ):
        self._path, self._about, self._file = path, about, file
        self.done, self.said = list(done), list(said)
        self._begun, self._settled = bool(done), time.monotonic()

    def write(self, lines: Sequence[Line]) -> None:
        """Append lines, all at once; what was there before a file is begun anew goes now, and not earlier."""
        if self._path is None or self._file is None:
            return
        if not self._begun:
            with writing_out(self._path):
                self._file.truncate(0)
                write_json(about_path(self._path), self._about)
            self._begun = True
        append_lines(self._path, self._file, "".join(map(written_line, lines)))
        if time.monotonic() - self._settled >= _SETTLE_SECONDS:
            self.settle()

    def settle(self) -> None:
        """Put what was written on disk."""
        if self._path is not None and self._file is not None:
            settle(self._path, self._file)
            self._settled = time.monotonic()


@contextlib.contextmanager
def kept_lines(
    out: str, about: Mapping[str, Any], total: int, belongs: Belongs, *, overwrite: bool
) -> Iterator[KeptLines]:
    """The file `out` to go on with, held while in here; nothing is kept if it is empty.

    Args:
      about: what it is of: `command`, `judge` (see `judge_identity`), `digest` of what is judged, and `settings`.
      total: lines that it has when it is finished.
      belongs: whether a line that is there is the one of its place.

    Raises:
      UserError: it was begun with something else, is no file of ours, is in use, or cannot be written.
    """
    if not out:
        yield KeptLines()
        return
    path, about = Path(out), {**about, "lines": total}
    with held_lines(path) as held:
        with writing_out(path):
            anew = overwrite or not path.stat().st_size
            kept = KeptLines(path, about, held) if anew else _resumed(path, held, about, belongs)
        yield kept
        kept.settle()


def _resumed(path: Path, held: IO[bytes], about: Mapping[str, Any], belongs: Belongs) -> KeptLines:
    beside = about_path(path)
    if not beside.exists():
        raise UserError(f"--out={path} is there, and no {beside.name} says what it is of; {BEGIN_ANEW}")
    _check_same(path, read_json(beside, BEGIN_ANEW), about)
    lines: list[Line] = []

    def check(at: int, line: bytes) -> None:
        try:
            one = json.loads(line)
        except ValueError:
            one = None
        if at >= about["lines"] or not isinstance(one, dict) or not belongs(at, one):
            raise UserError(f"--out={path} line {at + 1} is not the verdict of its place; {BEGIN_ANEW}")
        lines.append(one)

    _, torn = cut_torn_line(path, check)
    said = [f"{path}: the last line was torn; its {torn:,} bytes are cut"] if torn else []
    if lines:
        finished = ": finished; --overwrite begins it anew" if len(lines) == about["lines"] else ""
        said.append(f"{path}: {len(lines):,} of {about['lines']:,} lines are judged{finished}")
    return KeptLines(path, about, held, lines, said)


def check_same_judge(path: Path, record: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse, with a UserError, a file that was begun with another judge."""
    there, here = record.get("judge"), about["judge"]
    if there == here:
        return
    name = there.get("name") if isinstance(there, Mapping) else None
    same = ": the same name, but not the same judge" if name == here["name"] else ""
    raise UserError(
        f"--out={path} was begun with another judge ({name!r} there, {here['name']!r} now{same}); {BEGIN_ANEW}"
    )


def _check_same(path: Path, record: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    begun = f"--out={path} was begun with"
    if record.get("command") != about["command"]:
        raise UserError(f"{begun} judge {record.get('command')}, this is judge {about['command']}; {BEGIN_ANEW}")
    check_same_judge(path, record, about)
    if record.get("digest") != about["digest"] or record.get("lines") != about["lines"]:
        there, here = record.get("lines"), about["lines"]
        raise UserError(f"{begun} other answers ({there} lines of it there, {here} now); {BEGIN_ANEW}")
    old, new = record.get("settings") or {}, about["settings"]
    if changed := [f"{key}: {old.get(key)!r} there, {new[key]!r} now" for key in new if old.get(key) != new[key]]:
        raise UserError(f"{begun} other settings ({'; '.join(changed)}); {BEGIN_ANEW}")
