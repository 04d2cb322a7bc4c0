"""Whole directories of a bucket: removed, moved and published in an order that a kill at any point leaves readable."""

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.bucket import client
from dpo_jax.bucket.path import BucketPath

COMMITTED = "commit_success.txt"  # of orbax: the last object of a checkpoint, where nothing can be renamed
THREADS = 8  # requests under way at a time


def is_committed(checkpoint: Path | BucketPath) -> bool:
    """Whether a checkpoint was written to its end: one in a bucket has orbax's mark, any other was renamed."""
    return not isinstance(checkpoint, BucketPath) or (checkpoint / COMMITTED).is_file()


def remove_objects(directory: BucketPath, first: Sequence[str] = ()) -> None:
    """Delete all objects below a directory; those of the names `first` before any other, one after the other."""
    held = [one.key for one in client.list_objects(directory.bucket, f"{directory.key}/")[0]]
    begin = [f"{directory.key}/{name}" for name in first]
    for key in begin:
        if key in held:
            client.delete_object(directory.bucket, key)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        rest = [key for key in held if key not in begin]
        list(pool.map(lambda key: client.delete_object(directory.bucket, key), rest))


def move_objects(source: BucketPath, target: BucketPath, first: Sequence[str] = ()) -> None:
    """Move a directory: all is copied, then deleted as by `remove_objects`. Done again after a kill, it is finished."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        held = [one.key for one in client.list_objects(source.bucket, f"{source.key}/")[0]]
        copy = lambda key: client.copy_object(source.bucket, key, target.key + key.removeprefix(source.key))
        list(pool.map(copy, held))
    remove_objects(source, first)


def replace_objects(local: Path, target: BucketPath, last: Sequence[str]) -> None:
    """Upload a local directory in place of the one in the bucket.

    The files of the names `last` tell that it is whole: the old ones go first and the new ones come last.
    """
    files = {path.relative_to(local).as_posix(): path for path in sorted(local.rglob("*")) if path.is_file()}
    for name in last:
        client.delete_object(target.bucket, f"{target.key}/{name}")
    for name, path in sorted(files.items(), key=lambda item: item[0] in last):
        with path.open("rb") as file:
            client.write_object(target.bucket, f"{target.key}/{name}", file)
    for held in client.list_objects(target.bucket, f"{target.key}/")[0]:
        if held.key.removeprefix(f"{target.key}/") not in files:
            client.delete_object(target.bucket, held.key)
