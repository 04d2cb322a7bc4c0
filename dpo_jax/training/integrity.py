"""Checksums of a directory's files: written before it counts as whole, compared before it is trusted."""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.sums import object_difference, object_sums
from dpo_jax.disk import write_whole

NAME = "checksums.json"
THREADS = 4  # hashing leaves Python's lock, so files are read and hashed next to each other


def write_checksums(directory: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Write `checksums.json`: size and SHA-256 of every file in `directory`, each on disk before it is listed.

    In a bucket it is size and CRC32C, as the server has them of what arrived: nothing is read back.
    The files are complete, but for those of a name in `leave_out`, which still change.
    """
    if isinstance(directory, BucketPath):
        sums = object_sums(directory, (NAME, *leave_out))
        write_whole(directory / NAME, json.dumps(sums, indent=1))
        return
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    names = sorted(name for name in files if name not in (NAME, *leave_out))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        held = dict(zip(names, pool.map(lambda name: _digest(directory / name, sync=True), names), strict=True))
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in held.items()}
    write_whole(directory / NAME, json.dumps(listed, indent=1))  # no newline: every byte that is lost tells


def damage(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the first file that is not as `checksums.json` has it; None if nothing is.

    A `share` of (i, n) reads every nth file from the ith on: n processes share the work.
    """
    try:
        listed = json.loads((directory / NAME).read_text())
        wanted = {name: (int(entry["bytes"]), *_sum_of(entry)) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"there is no {NAME}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{NAME} cannot be read"
    mine = sorted(wanted)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        differences = pool.map(lambda name: _difference(directory / name, name, *wanted[name]), mine)
        return next((words for words in differences if words), None)


def _sum_of(entry: dict[str, str]) -> tuple[str, str]:
    """The kind of a file's checksum and the checksum; a KeyError if it has none."""
    kind = "crc32c" if "crc32c" in entry else "sha256"
    return kind, str(entry[kind])


def _difference(path: Path, name: str, size: int, kind: str, digest: str) -> str | None:
    try:
        if kind == "crc32c" or isinstance(path, BucketPath):
            return object_difference(path, name, size, kind, digest)
        there = path.stat().st_size
        if there != size:
            return f"{name} has {there:,} bytes, {size:,} were written"
        return None if _digest(path)[1] == digest else f"{name} is not what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as e:
        return f"{name} cannot be read ({e.strerror})"


def _digest(path: Path, *, sync: bool = False) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        if sync:
            os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()
