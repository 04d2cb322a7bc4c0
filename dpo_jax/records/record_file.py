"""A JSON-lines file that grows: whole records or none of them, and how many there are."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from dpo_jax.bucket.parts import PartsFile
from dpo_jax.bucket.path import BucketPath
from dpo_jax.disk import is_full, read_pieces
from dpo_jax.errors import BAD_INPUT, SAVE_FAILED, UserError
from dpo_jax.records.records import Record, truncate_records, without_nan


class _LocalFile:
    """A file that grows, on a disk; in a bucket it is a `PartsFile`."""

    def __init__(self, path: Path):
        self._file: IO[bytes] = path.open("ab", buffering=0)

    def write(self, content: bytes) -> None:
        """Append all of it or, where the disk is full, nothing."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def sync(self) -> None:
        """Have it on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of it."""
        self._file.close()


class RecordFile:
    """Records are appended to `path`, which is made with the first one.

    What a kill left half-written at its end is removed when it is opened. JSON has neither NaN nor infinity: a number
    that is not finite is written as `null`.

    Args:
      shape: of its records, see `disk.check_shape`.

    Raises:
      UserError: the file holds anything else, or cannot be written.
    """

    def __init__(self, path: Path, shape: Any = None):
        self._path, self._shape = path, shape
        self._file: _LocalFile | PartsFile | None = None
        self.keep(lambda record: True)

    def keep(self, keep: Callable[[Record], bool]) -> None:
        """Remove the records for which `keep` is false."""
        self.close()
        with self._writing(BAD_INPUT):
            truncate_records(self._path, keep, self._shape)
            content = b"".join(read_pieces(self._path).values())
        self._records, self._digest = content.count(b"\n"), hashlib.sha256(content)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, all of them or, where the disk is full, none; they outlive this process, see `sync`.

        Raises:
          UserError: they cannot be written.
        """
        lines = [json.dumps(without_nan(record), allow_nan=False, ensure_ascii=False) + "\n" for record in records]
        content = "".join(lines).encode("utf-8", "backslashreplace")  # half a character in JSON's own way: \ud800
        if not content:
            return
        with self._writing(SAVE_FAILED):
            if self._file is None:
                self._file = PartsFile(self._path) if isinstance(self._path, BucketPath) else _LocalFile(self._path)
            self._file.write(content)
        self._records += len(lines)
        self._digest.update(content)

    def sync(self) -> None:
        """Have all records on disk: they then outlive the machine, as a checkpoint does that is made after them."""
        if self._file is not None:
            with self._writing(SAVE_FAILED):
                self._file.sync()

    @property
    def held(self) -> dict[str, Any]:
        """How many `records` there are, and a `digest` of them."""
        return {"records": self._records, "digest": self._digest.hexdigest()}

    def close(self) -> None:
        """Let go of the file; the next record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _writing(self, code: int) -> Any:
        try:
            yield
        except OSError as error:
            mend = "make room" if is_full(error) else "make it writable"
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror or error}); checkpoints from before are kept: "
                f"{mend}, then the same command resumes from the newest",
                code=SAVE_FAILED if is_full(error) else code,
            ) from None


def lost_records(name: str, held: Mapping[str, Any], wanted: Mapping[str, Any] | None, checkpoint: int) -> str | None:
    """What a file lacks of the records that a checkpoint was made with, in words; None if nothing is known to be lost.

    Args:
      name: of the file.
      held: what it holds, `RecordFile.held`, of the updates up to the checkpoint.
      wanted: what it held then; None: nobody wrote it down.
    """
    if wanted is None or held == wanted or held["records"] > wanted["records"]:  # answers after the last checkpoint
        return None
    if held["records"] == wanted["records"]:
        return f"{name} is not as it was when checkpoint {checkpoint} was made: its records were changed"
    there = f"{held['records']:,}" if held["records"] else "none"
    return (
        f"{name} has {there} of the {wanted['records']:,} records that were there when checkpoint {checkpoint} was "
        "made; the run goes on, its page and its curves lack the others"
    )
