"""Paths in a bucket: what a run's code does with a `pathlib.Path`, on the objects of Google Cloud Storage.

There are no directories: one is there while an object lies below it. Each object is written whole or not at all.
"""

import dataclasses
import fnmatch
import functools
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from dpo_jax.bucket import client
from dpo_jax.errors import UserError

SCHEME = "gs://"
_ADDRESS = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,221}[a-z0-9])(?:/(.*))?", re.DOTALL)
_REMOTE = re.compile(r"[A-Za-z][\w+.-]*:/")
_MAGIC = re.compile(r"[*?\[]")


def as_path(address: str | os.PathLike[str]) -> Path:
    """A local path, or for gs://BUCKET/DIR what behaves like one.

    It is no `os.PathLike`: what only takes local files refuses it, in place of writing to a directory called gs:.

    Raises:
      UserError: an address of another kind, or of no object in a bucket; or the packages for buckets are not installed.
    """
    if isinstance(address, BucketPath):
        return cast(Path, address)
    text = os.fspath(address)
    if not text.startswith(SCHEME):
        if _REMOTE.match(text):
            raise UserError(f"{text}: addresses of this kind are not supported; give a directory or gs://BUCKET/DIR")
        return Path(text)
    match = _ADDRESS.fullmatch(text)
    parts = (match[2] or "").split("/") if match else []
    if match is None or any(part in (".", "..") or not part.isprintable() for part in parts):
        raise UserError(f"{text}: is no address in a bucket; give gs://BUCKET/DIR")
    key = "/".join(filter(None, parts))
    if not key or len(key.encode()) > 900:  # an object's name may have 1,024 bytes
        raise UserError(f"{text}: needs a directory of at most 900 bytes in the bucket; give gs://BUCKET/DIR")
    client.check_installed(text)
    return cast(Path, BucketPath(match[1], key))


@functools.total_ordering
@dataclasses.dataclass(frozen=True)
class BucketPath:
    """An object, or a directory, of a bucket: the methods of `pathlib.Path` that a run needs.

    Errors are the client's: FileNotFoundError, or a UserError of one line.

    Attributes:
      bucket: its name.
      key: of the object, or what those of a directory begin with, without a / at either end.
      listed: what a listing said of the object, where this is from one.
    """

    bucket: str
    key: str
    listed: client.Held | None = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | PurePosixPath) -> "BucketPath":
        return BucketPath(self.bucket, str(PurePosixPath(self.key) / name))

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return (SCHEME + self.bucket, *PurePosixPath(self.key).parts)

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(self.bucket, str(PurePosixPath(self.key).parent))

    def with_name(self, name: str) -> "BucketPath":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "BucketPath":
        return BucketPath(self.bucket, str(PurePosixPath(self.key).with_suffix(suffix)))

    def relative_to(self, other: "BucketPath") -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(other.key)

    def absolute(self) -> "BucketPath":
        return self

    resolve = expanduser = absolute

    def as_posix(self) -> str:
        return str(self)

    def is_file(self) -> bool:
        return self.listed is not None or client.find_object(self.bucket, self.key) is not None

    def is_dir(self) -> bool:
        return self.listed is None and bool(client.list_objects(self.bucket, f"{self.key}/", most=1)[0])

    def is_symlink(self) -> bool:
        return False

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self) -> os.stat_result:
        """Size and time of an object; of a directory nothing but that it is one."""
        held = self.listed or client.find_object(self.bucket, self.key)
        if held is not None:
            times = (held.updated.timestamp(),) * 3
            return os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, held.size, *map(int, times)))
        if self.is_dir():
            return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        raise FileNotFoundError(2, "no such object", str(self))

    lstat = stat

    def iterdir(self) -> Iterator["BucketPath"]:
        """What lies directly in a directory."""
        files, directories = client.list_objects(self.bucket, f"{self.key}/", below=False)
        for beginning in directories:
            yield BucketPath(self.bucket, beginning.rstrip("/"))
        for held in files:
            if not held.key.endswith("/"):  # an empty object that stands for the directory
                yield BucketPath(self.bucket, held.key, held)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Files and directories of a pattern without **."""
        first, _, rest = pattern.partition("/")
        if not _MAGIC.search(first):
            found = iter([self / first] if rest or (self / first).exists() else [])
        else:
            found = (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first))
        for path in found:
            if rest:
                yield from path.glob(rest)
            else:
                yield path

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """The files, at any depth, whose names are of a pattern."""
        for held in client.list_objects(self.bucket, f"{self.key}/")[0]:
            if not held.key.endswith("/") and fnmatch.fnmatchcase(PurePosixPath(held.key).name, pattern):
                yield BucketPath(self.bucket, held.key, held)

    def read_bytes(self) -> bytes:
        return client.read_object(self.bucket, self.key)[0]

    def read_text(self, encoding: str | None = "utf-8", errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, content: bytes) -> int:
        client.write_object(self.bucket, self.key, content)
        return len(content)

    def write_text(self, text: str, encoding: str | None = "utf-8", errors: str | None = None) -> int:
        return self.write_bytes(text.encode(encoding or "utf-8", errors or "strict"))

    def open(self, mode: str = "r", encoding: str | None = "utf-8", **_: Any) -> IO[Any]:
        """The content of an object, to read; `disk.py` writes."""
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"{self}: mode {mode!r}, but objects are written whole: see disk.whole_file")
        content = io.BytesIO(self.read_bytes())
        return content if "b" in mode else io.TextIOWrapper(content, encoding=encoding or "utf-8")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a directory is there when an object is."""

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(2, "no such object", str(self))
        client.delete_object(self.bucket, self.key)

    def rmdir(self) -> None:
        """Nothing: a directory goes with its last object."""
