"""A model's directory in a bucket: copied to the local cache once, and known by the objects' checksums."""

import concurrent.futures
import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.bucket import client
from dpo_jax.bucket.local import local_twin
from dpo_jax.bucket.path import SCHEME, BucketPath, as_path
from dpo_jax.disk import digest
from dpo_jax.errors import SAVE_FAILED, UserError

FILES_AT_ONCE = 4


def is_in_bucket(model: str) -> bool:
    """Whether a model's name is an address in a bucket."""
    return model.startswith(SCHEME)


def fetch_model(address: str, patterns: Sequence[str], what: str) -> Path:
    """The local copy of a model's directory in a bucket; every file is compared with the server's checksum.

    What is there has the same objects, by size and checksum: where any of them has changed, it is another copy.

    Args:
      address: gs://BUCKET/DIR.
      patterns: of the files to copy, relative to the directory.
      what: the config key that the address came from, for messages.

    Raises:
      UserError: there is no such directory, it cannot be read, or there is no room for it.
    """
    directory = as_path(address)
    assert isinstance(directory, BucketPath)
    held = {one.key.removeprefix(f"{directory.key}/"): one for one in _listed(directory)}
    wanted = {name: one for name, one in held.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    wanted = {name: one for name, one in wanted.items() if name.count("/") <= 1}
    if not wanted:
        there = "has no file of a model" if held else "there is no such directory"
        raise UserError(f"{what}={address!r}: {there}; give a Hugging Face model directory")
    mark = digest(json.dumps([[name, one.size, one.crc32c] for name, one in sorted(wanted.items())]))
    copy = local_twin(directory) / mark
    if copy.is_dir():
        return copy
    new = copy.with_name(f".{mark}.{uuid.uuid4().hex[:8]}")
    try:
        with concurrent.futures.ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda item: _fetch(item[1], directory.bucket, new / item[0]), wanted.items()))
        try:
            new.rename(copy)
        except OSError:  # another process was first
            if not copy.is_dir():
                raise
    except OSError as error:
        raise UserError(
            f"{what}={address!r}: cannot be copied to {copy.parent} ({error.strerror or error}); make room there, or "
            "name another place in DPO_JAX_CACHE",
            code=SAVE_FAILED,
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return copy


def _listed(directory: BucketPath) -> list[client.Held]:
    return [one for one in client.list_objects(directory.bucket, f"{directory.key}/")[0] if not one.key.endswith("/")]


def _fetch(one: client.Held, bucket: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        client.download_object(bucket, one.key, file)
        file.flush()
        os.fsync(file.fileno())
