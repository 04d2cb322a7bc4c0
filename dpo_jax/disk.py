"""Files that are whole or not there, JSON objects read with a clear error, and digests."""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from dpo_jax.errors import UserError

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
