"""Files that are whole or not there, JSON objects read with a clear error, and digests."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from dpo_jax.bucket import client
from dpo_jax.bucket.parts import PartsFile, parts_of
from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.tree import remove_objects
from dpo_jax.errors import UserError

_IN_MEMORY = 1 << 23  # bytes of an object that is written from memory
_SAMPLES, _SAMPLE = 64, 1 << 16  # of a file: so many pieces of so many bytes tell it from any other


@contextlib.contextmanager
def whole_file(path: Path, *, exclusive: bool = False) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` when the block ends, in one step and with its content on disk.

    Until then, and after an error or a kill, what was at `path` before is still there. The directory must exist.

    Raises:
      FileExistsError: `exclusive`, and there is a file at `path` by now; of several writers only the first succeeds.
    """
    if isinstance(path, BucketPath):
        with _whole_object(path, exclusive) as file:
            yield file
        return
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # several processes may write the same file
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(scratch, path)
        else:
            scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def _whole_object(path: BucketPath, exclusive: bool) -> Iterator[IO[bytes]]:
    """`whole_file` of a bucket: an object is there when all of it has arrived, and not before."""
    with tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        content = file.read() if os.fstat(file.fileno()).st_size < _IN_MEMORY else file
        try:
            client.write_object(path.bucket, path.key, content, generation=0 if exclusive else None)
        except client.Overtaken:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None


def open_append(path: Path) -> Any:
    """A text file to append to, created if it is missing: `write`, `writelines`, `flush`, `close`, a context manager.

    In a bucket it grows by parts (`bucket/parts.py`), which `read_appended` joins.
    """
    return PartsFile(path) if isinstance(path, BucketPath) else path.open("a", encoding="utf-8")


def read_pieces(path: Path) -> dict[Path, bytes]:
    """The content of a file that is appended to: its own, and that of parts that were written in a bucket, in order."""
    pieces = {}
    for piece in [path, *cast("list[Path]", parts_of(path))]:
        with contextlib.suppress(FileNotFoundError):
            pieces[piece] = piece.read_bytes()
    return pieces


def remove_tree(directory: Path) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if isinstance(directory, BucketPath):
        remove_objects(directory)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def copy_file(source: Path, target: Path) -> Path:
    """Copy a local file to `target`, which may be in a bucket."""
    if isinstance(target, BucketPath):
        with source.open("rb") as file:
            client.write_object(target.bucket, target.key, file)
        return cast(Path, target)
    return Path(shutil.copyfile(source, target))


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there with this content or not at all; text as UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write `value` as an indented JSON file, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=sort_keys) + "\n")


def read_json(path: Path, mend: str = "restore or remove it") -> dict[str, Any]:
    """The JSON object in a file; `mend`, what to do where it holds none, ends the error's sentence.

    Raises:
      UserError: the file cannot be read, or holds anything but a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {mend}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, needs an object; {mend}")
    return value


def digest(content: str | bytes | Iterable[bytes], size: int = 12) -> str:
    """BLAKE2b of a text or of bytes, whole or in pieces, as hexadecimal digits, two for each of its `size` bytes.

    >>> digest("pairs") == digest([b"pa", b"irs"]), digest("pairs", size=4)
    (True, '6dab6d70')
    """
    pieces = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    hashed = hashlib.blake2b(digest_size=size)
    for piece in pieces:
        hashed.update(piece)
    return hashed.hexdigest()


def file_digest(path: Path) -> dict[str, Any]:
    """Size and digest of a file: of its beginning (which names the tensors, of weights) and of pieces throughout."""
    size = path.stat().st_size
    last = max(0, size - _SAMPLE)
    with path.open("rb") as file:

        def pieces() -> Iterator[bytes]:
            for start in sorted(
                {int(i * (last / (_SAMPLES - 1))) if i < _SAMPLES - 1 else last for i in range(_SAMPLES)}
            ):
                file.seek(start)
                yield file.read(_SAMPLE)

        return {"bytes": size, "digest": digest(pieces())}
