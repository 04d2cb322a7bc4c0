"""A file that grows by lines and is resumed; FILE.about.json beside it says what it is of. No JAX."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dpo_jax.errors import UserError

ABOUT = ".about.json"
BEGIN_ANEW = "give another --out, or --overwrite to begin it anew"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # a file system that has none


def about_path(path: Path) -> Path:
    """Where the record of a file of lines is."""
    return path.with_name(path.name + ABOUT)


@contextlib.contextmanager
def writing_out(path: Path) -> Iterator[None]:
    """What the system says against writing is said of --out."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written ({error.strerror}); make room, or choose another") from error


@contextlib.contextmanager
def held_lines(path: Path, empty_stays: Callable[[], bool] = lambda: False) -> Iterator[IO[bytes]]:
    """The file, open to append, while no other command has it.

    It and its record are gone if it is empty at the end, unless then `empty_stays`.

    Raises:
      UserError: it cannot be written, or is in use.
    """
    with writing_out(path):
        held = path.open("ab")
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"--out={path} is in use by another command; wait for it, or choose another") from None
        try:
            yield held
        finally:
            # Refused, or stopped before the first line: as if it had never begun.
            if not path.stat().st_size and not empty_stays():
                about_path(path).unlink(missing_ok=True)
                path.unlink()


def written_line(value: Mapping[str, Any]) -> str:
    """A mapping as a line of JSON."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can hold
        text = json.dumps(value)
    return text + "\n"


def append_lines(path: Path, held: IO[bytes], lines: str) -> None:
    """Append whole lines; they are with the system when this returns."""
    with writing_out(path):
        held.write(lines.encode())
        held.flush()


def settle(path: Path, held: IO[bytes]) -> None:
    """Put what was written on disk."""
    with writing_out(path):
        os.fsync(held.fileno())


def cut_torn_line(path: Path, check: Callable[[int, bytes], None]) -> tuple[int, int]:
    """The whole lines of a file, each shown to `check` with its place from 0; a last one without its end is cut.

    Returns:
      How many lines there are, and how many bytes were cut.
    """
    count = end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            check(count, line)
            count, end = count + 1, end + len(line)
    torn = path.stat().st_size - end
    if torn:
        os.truncate(path, end)
    return count, torn
