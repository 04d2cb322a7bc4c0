"""Local directories for what only local files will do, such as a tokenizer: made again where they are missing."""

import hashlib
import os
from pathlib import Path

from dpo_jax.bucket.path import BucketPath


def local_twin(directory: Path | BucketPath) -> Path:
    """`directory` itself; for one in a bucket a directory below $DPO_JAX_CACHE or ~/.cache/dpo_jax that is its own."""
    if not isinstance(directory, BucketPath):
        return directory
    named = os.environ.get("DPO_JAX_CACHE", "")
    root = Path(named if named and "://" not in named else "~/.cache/dpo_jax").expanduser()
    return root / "buckets" / hashlib.blake2b(str(directory).encode(), digest_size=12).hexdigest()
