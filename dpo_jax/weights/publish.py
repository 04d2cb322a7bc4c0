"""A model's directory in a bucket, written in the local cache and then uploaded."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.tree import publish
from dpo_jax.bucket.twin import local_twin
from dpo_jax.errors import SAVE_FAILED, UserError
from dpo_jax.weights.hub import ADAPTER_CONFIG, CONFIG


@contextlib.contextmanager
def new_in_bucket(directory: BucketPath) -> Iterator[Path | None]:
    """`new_directory` of a bucket: written in the local cache, then uploaded, what tells that it is whole at last."""
    if jax.process_index() == 0:
        local = local_twin(directory)
        shutil.rmtree(local, ignore_errors=True)
        try:
            local.mkdir(parents=True)
            yield local
        except OSError as e:
            raise UserError(
                f"{directory}: the export cannot be written in {local} ({e.strerror or e}); checkpoints are kept: make "
                "room there, or name another place in DPO_JAX_CACHE, then the same command writes it",
                code=SAVE_FAILED,
            ) from e
        publish(local, directory, last=(CONFIG, ADAPTER_CONFIG))
        shutil.rmtree(local, ignore_errors=True)
    else:
        yield None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpo_jax.weights.huggingface.new_directory")
