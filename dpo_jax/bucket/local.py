"""Where local copies lie: of caches, and of what only local files will do, such as a tokenizer of a run in a bucket."""

import hashlib
import os
from pathlib import Path

from dpo_jax.bucket.path import BucketPath


def cache_root(cache_dir: str = "") -> Path:
    """The local directory of all caches: `cache_dir`, else $DPO_JAX_CACHE, else ~/.cache/dpo_jax.

    An address such as gs://bucket/dir is passed over: it names a shared cache, of which this directory has copies.
    """
    named = (cache_dir, os.environ.get("DPO_JAX_CACHE", ""))
    return Path(next((path for path in named if path and "://" not in path), "~/.cache/dpo_jax")).expanduser()


def local_twin(directory: Path | BucketPath) -> Path:
    """`directory` itself; for one in a bucket a local directory of its own, made again where it is missing."""
    if not isinstance(directory, BucketPath):
        return directory
    return cache_root() / "buckets" / hashlib.blake2b(str(directory).encode(), digest_size=12).hexdigest()
