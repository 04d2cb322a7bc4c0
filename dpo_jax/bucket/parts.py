"""Files that only grow, in a bucket, where no object can be appended to.

NAME.parts/00000000, 00000001 and so on are joined when the file is read; the last one is written again with every
few seconds' lines until it is large. Each write asks for the generation that the one before gave: of two writers the
one that was overtaken is told so, and neither loses the other's lines.
"""

import time
import weakref
from pathlib import Path

from dpo_jax.bucket import client
from dpo_jax.bucket.path import BucketPath
from dpo_jax.errors import UserError

PART_BYTES = 1 << 18  # a part that has so many is the last to be written again
FLUSH_SECONDS = 5.0  # between writes: a bucket takes about one a second of an object
_SUFFIX = ".parts"
_OPEN: "weakref.WeakSet[PartsFile]" = weakref.WeakSet()  # of this process, which reads what it has appended


class PartsFile:
    """A file that grows, opened to append to. What `sync` or `close` have written outlives this process."""

    def __init__(self, path: BucketPath):
        self.path, self._new, self._failed = path, b"", False
        held = sorted(parts_of(path))
        self._number, self._tail, self._generation = len(held), b"", 0
        if held:
            last = _part(path, int(held[-1].name))
            self._number = int(last.name)
            self._tail, self._generation = client.read_object(last.bucket, last.key)
            self._next_part()
        self._written = time.monotonic()
        _OPEN.add(self)

    def write(self, content: bytes) -> int:
        """Append whole lines. They are written at once if the last time was a while ago."""
        self._new += content
        if time.monotonic() - self._written > FLUSH_SECONDS:
            self.sync()
        return len(content)

    def sync(self) -> None:
        """Write what is new.

        Raises:
          UserError: another run writes this file, or the bucket cannot be written.
        """
        if not self._new:
            return
        content, part = self._tail + self._new, _part(self.path, self._number)
        try:
            self._generation = client.write_object(part.bucket, part.key, content, generation=self._generation)
        except client.BucketError:
            self._failed = True
            raise
        except client.Overtaken:
            self._failed = True
            raise UserError(
                f"{self.path}: another run writes it, so this one ends; give each its own --workdir"
            ) from None
        self._tail, self._new, self._written = content, b"", time.monotonic()
        self._next_part()

    def close(self) -> None:
        """Write what is new, unless that has failed before, and let go of the file."""
        _OPEN.discard(self)
        if not self._failed:
            self.sync()

    def __enter__(self) -> "PartsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_part(self) -> None:
        if len(self._tail) >= PART_BYTES:
            self._number, self._tail, self._generation = self._number + 1, b"", 0


def parts_of(path: Path | BucketPath) -> list[Path | BucketPath]:
    """The parts of a file in their order; of a directory that was copied from a bucket, too."""
    for file in list(_OPEN):
        if file.path == path:
            file.sync()
    directory = path.with_name(path.name + _SUFFIX)
    if isinstance(directory, Path) and not directory.is_dir():
        return []
    return sorted((part for part in directory.iterdir() if part.name.isdigit()), key=lambda part: part.name)


def _part(path: BucketPath, number: int) -> BucketPath:
    return path.with_name(path.name + _SUFFIX) / f"{number:08}"
