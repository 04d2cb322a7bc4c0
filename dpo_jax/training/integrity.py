"""Checksums of a directory's files: written before it counts as whole, compared before it is trusted."""

import concurrent.futures
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from typing_extensions import TypedDict

from dpo_jax.bucket.client import BucketError
from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.sums import object_difference, object_sums
from dpo_jax.disk import read_json, write_whole
from dpo_jax.errors import UserError

NAME = "checksums.json"
THREADS = 4  # hashing leaves Python's lock, so files are read and hashed next to each other


class Checksum(TypedDict):
    """A file as it was written."""

    bytes: Annotated[int, Interval(ge=0)]
    sha256: str


class ObjectSum(TypedDict):
    """An object of a bucket as it arrived there; in base64, as the bucket lists it."""

    bytes: Annotated[int, Interval(ge=0)]
    crc32c: str


def write_checksums(directory: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Write `checksums.json`: size and SHA-256 of every file in `directory`, each on disk before it is listed.

    In a bucket it is size and CRC32C, as the server has them of what arrived: nothing is read back.
    The files are complete, but for those of a name in `leave_out`, which still change.
    """
    if isinstance(directory, BucketPath):
        sums = object_sums(directory, (NAME, *leave_out))
        write_whole(directory / NAME, json.dumps(sums, indent=1))
        return
    names = _files(directory, leave_out)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        held = dict(zip(names, pool.map(lambda name: _digest(directory / name, sync=True), names), strict=True))
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in held.items()}
    write_whole(directory / NAME, json.dumps(listed, indent=1))  # no newline: every byte that is lost tells


def damage(directory: Path, share: tuple[int, int] = (0, 1), leave_out: tuple[str, ...] = ()) -> str | None:
    """What is wrong with the first file that is not as `checksums.json` has it; None if nothing is.

    A file that is not listed is wrong, too, but for those that are named in `leave_out`: nothing vouches for it. A
    `share` of (i, n) reads every nth file from the ith on: n processes share the work.
    """
    if not (directory / NAME).exists():
        return f"there is no {NAME}"
    try:
        wanted = read_json(directory / NAME, shape=dict[str, Checksum | ObjectSum])
    except BucketError:  # which says nothing about the file
        raise
    except UserError:
        return f"{NAME} cannot be read"
    try:
        there = _files(directory, leave_out)
    except OSError as e:
        return f"it cannot be read ({e.strerror})"
    # Only names that are there are opened: one that the list makes up leads nowhere.
    if missing := sorted(set(wanted) - set(there)):
        return f"{missing[0]} is missing"
    if unknown := sorted(set(there) - set(wanted)):
        return f"{unknown[0]} is not in {NAME}"
    if not wanted:
        return f"{NAME} lists no file"
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        differences = pool.map(
            lambda name: _difference(directory / name, name, wanted[name]), there[share[0] :: share[1]]
        )
        return next((words for words in differences if words), None)


def _files(directory: Path, leave_out: tuple[str, ...]) -> list[str]:
    """The files below a directory, but for the checksums and those at its top that are named; no links, no pipes."""
    paths = [path for path in directory.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name not in (NAME, *leave_out))


def _difference(path: Path, name: str, wanted: dict[str, Any]) -> str | None:
    try:
        kind = "crc32c" if "crc32c" in wanted else "sha256"
        if kind == "crc32c" or isinstance(path, BucketPath):
            return object_difference(path, name, wanted["bytes"], kind, wanted[kind])
        there = path.stat().st_size
        if there != wanted["bytes"]:
            return f"{name} has {there:,} bytes, {wanted['bytes']:,} were written"
        return None if _digest(path)[1] == wanted["sha256"] else f"{name} is not what was written"
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
