"""A model's directory is there as a whole or not at all, on a disk or in a bucket."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from dpo_jax.bucket.local import local_twin
from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.tree import replace_objects
from dpo_jax.errors import SAVE_FAILED, UserError
from dpo_jax.weights.hub import ADAPTER_CONFIG, CONFIG


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path | None]:
    """A directory to write into that then takes the place of `directory`, whole or not at all; None but for process 0.

    For one in a bucket it is in the local cache, and is uploaded, what tells that it is whole at last. Every process
    enters and leaves together.

    Raises:
      UserError: it cannot be written.
    """
    remote = isinstance(directory, BucketPath)
    directory = directory if remote else Path(directory).absolute()
    # Where it takes the place by a rename, one that a kill has left is found again by its name.
    new = (
        local_twin(directory).with_suffix(f".{uuid.uuid4().hex[:8]}.new")
        if remote
        else directory.with_name(f".{directory.name}.new")
    )
    writes = jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        yield new if writes else None
        if writes:
            if isinstance(directory, BucketPath):
                replace_objects(new, directory, last=(CONFIG, ADAPTER_CONFIG))
            else:
                _take_its_place(new, directory)
    except (OSError, SafetensorError) as e:  # the library has an error of its own for a disk that is full
        why = e.strerror if isinstance(e, OSError) and e.strerror else " ".join(str(e).split())
        where, other = (f" in {new}", ", name another place in DPO_JAX_CACHE") if remote else ("", "")
        raise UserError(
            f"{directory}: the export cannot be written{where} ({why}); checkpoints are kept: make room{other}, or "
            "make it writable, then the same command writes it",
            code=SAVE_FAILED,
        ) from e
    finally:
        if writes:
            shutil.rmtree(new, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpo_jax.weights.publish.new_directory")


def _take_its_place(new: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
