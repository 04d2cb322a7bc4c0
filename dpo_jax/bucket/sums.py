"""Checksums of objects: CRC32C, which the bucket knows of each, or SHA-256, of files that were local before."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from dpo_jax.bucket import client
from dpo_jax.bucket.path import BucketPath

_PIECE = 1 << 22


def object_sums(directory: BucketPath, leave_out: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Size and CRC32C of the objects below a directory, by name, as the bucket lists them; without some names."""
    held = client.list_objects(directory.bucket, f"{directory.key}/")[0]
    held = [one for one in held if not one.key.endswith("/")]  # not those that stand for directories
    sums = {one.key.removeprefix(f"{directory.key}/"): one for one in held}
    return {name: {"bytes": one.size, "crc32c": one.crc32c} for name, one in sums.items() if name not in leave_out}


def object_difference(path: Path | BucketPath, name: str, size: int, kind: str, digest: str) -> str | None:
    """What is wrong with an object, or with a local copy of one; its content is read, not only what the bucket says.

    Args:
      kind: of the `digest` that its content must have: sha256 in hexadecimal digits, or crc32c in base64.

    Raises:
      FileNotFoundError: there is none.
    """
    there = path.stat().st_size
    if there != size:
        return f"{name} has {there:,} bytes, {size:,} were written"
    hashed = _Hash(kind)
    if isinstance(path, BucketPath):
        client.download_object(path.bucket, path.key, hashed, checked=False)
    else:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                hashed.write(piece)
    return None if hashed.text() == digest else f"{name} is not what was written"


class _Hash:
    """Something to write to that keeps only the checksum."""

    def __init__(self, kind: str):
        if kind == "crc32c":
            client.check_installed("a checkpoint that was written to a bucket")
            import google_crc32c  # with the packages for buckets

            self._sum: Any = google_crc32c.Checksum()
        else:
            self._sum = hashlib.sha256()

    def write(self, piece: bytes) -> int:
        self._sum.update(piece)
        return len(piece)

    def text(self) -> str:
        found: bytes = self._sum.digest()
        return base64.b64encode(found).decode() if len(found) == 4 else found.hex()
