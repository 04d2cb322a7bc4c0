"""Files that are whole or not there, JSON objects read with a clear error, and digests."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from dpo_jax.bucket import client
from dpo_jax.bucket.parts import parts_of
from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.tree import remove_objects
from dpo_jax.errors import UserError

_IN_MEMORY = 1 << 23  # bytes of an object that is written from memory
_SAMPLES, _SAMPLE = 64, 1 << 16  # of a file: so many pieces of so many bytes tell it from any other


def is_full(error: BaseException) -> bool:
    """True of an error that says that a disk, or the user's share of it, has no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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


def read_pieces(path: Path) -> dict[Path, bytes]:
    """The content of a file that is appended to: its own, and that of parts that were written in a bucket, in order."""
    pieces = {}
    for piece in [path, *cast("list[Path]", parts_of(path))]:
        with contextlib.suppress(FileNotFoundError):
            pieces[piece] = read_regular(piece)
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
    r"""Write a file so that it is there with this content or not at all.

    Text becomes UTF-8; half a character, such as of a file's name that is none, is written as JSON does it: \udcff.
    """
    with whole_file(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write `value` as an indented JSON file, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=sort_keys) + "\n")


def read_json(path: Path, mend: str = "restore or remove it", shape: Any = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      mend: what to do where it holds none; it ends the error's sentence.
      shape: what the object must be, see `check_shape`; None: any object.

    Raises:
      UserError: it is no regular file, cannot be read, or holds anything but such an object.
    """
    try:
        value = parse_json(read_regular(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {mend}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, needs an object; {mend}")
    if shape is not None:
        check_shape(value, shape, str(path), mend)
    return value


def read_regular(path: Path) -> bytes:
    """The content of a regular file; an OSError for anything else, such as a pipe, whose reading would never end."""
    if isinstance(path, BucketPath):
        return path.read_bytes()
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(None, "not a regular file")
        return file.read()


def write_in_place(path: Path, content: bytes) -> None:
    """Write a file or what stands in its place, such as a terminal; an OSError where it is a pipe that nobody reads."""
    if isinstance(path, BucketPath):
        path.write_bytes(content)
        return
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666)) as file:
        os.set_blocking(file.fileno(), True)  # one that is read takes a part at a time
        file.write(content)


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text; a ValueError, too, where it is nested too deeply or not UTF-8."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_shape(value: Any, shape: Any, where: str, mend: str) -> None:
    """Refuse a JSON value that is not of a shape.

    Args:
      shape: a type as pydantic knows them, such as a TypedDict or `dict[str, int]`. Nothing is converted: true is no
        number and "1" no 1; a whole number is a float, and keys that a TypedDict does not name may be there.
      where: what holds the value.

    Raises:
      UserError: with the first place that is not as it must be, what is there and what must be.
    """
    import pydantic  # slow to import

    try:
        _adapter(shape).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = _place(value, first["loc"], missing=first["type"] == "missing")
        bounds = [f"{words} {first['ctx'][name]:g}" for name, words in _BOUNDS.items() if name in first.get("ctx", {})]
        must = f"must be {bounds[0]}" if bounds else _lower(first["msg"].replace("Input should be", "must be"))
        found = " is missing" if first["type"] == "missing" else f" is {_shown(first['input'])}"
        words = f"{place or 'it'}{found}" + ("" if first["type"] == "missing" else f", {must}")
        raise UserError(f"{where}: {words}; {mend}") from None


def _place(value: Any, path: Sequence[str | int], *, missing: bool) -> str:
    """Keys and positions down to what is wrong: `rows.0.widths`."""
    named = []
    for i, part in enumerate(path):
        there = (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int))
        if not there and not (missing and i == len(path) - 1):  # pydantic's name of an alternative
            break
        value = value[part] if there else None
        named.append(str(part) if str(part).isidentifier() or isinstance(part, int) else _shown(part))
    return ".".join(named)


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


@functools.cache
def _adapter(shape: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(shape)


def _shown(value: Any) -> str:
    """The beginning of a value in printable ASCII, however large it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a huge number"
    text = json.dumps(value[:41] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:40]}..."


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
