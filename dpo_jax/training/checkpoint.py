"""Orbax checkpoints of a run: save, find, restore on any mesh; with checksums, as orbax has none of the contents.

A checkpoint is the train state; its number is the run's position. The reference's parameters are saved once, apart, and
only by a run that made them itself.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dpo_jax.bucket.client import prepare_libraries
from dpo_jax.bucket.parts import sync_appended
from dpo_jax.bucket.path import BucketPath
from dpo_jax.bucket.tree import move_objects
from dpo_jax.errors import SAVE_FAILED, UserError
from dpo_jax.parallel import processes
from dpo_jax.parallel.mesh import any_process, from_first
from dpo_jax.parallel.processes import is_of_a_lost_peer
from dpo_jax.training import integrity

# Orbax reports every phase of every save, and its own traceback of a failed one, which `_saving` reports in a line.
logging.getLogger("absl").addFilter(lambda record: record.levelno == logging.WARNING or "orbax" not in record.pathname)

_UNFINISHED = ".orbax-checkpoint-tmp"
_METADATA = "_CHECKPOINT_METADATA"  # of orbax: it gets its last time stamp after our checksums
_COMMITTED = "commit_success.txt"  # of orbax in a bucket: its last object, where nothing can be renamed
DAMAGED = "damaged"  # below the run's directory: where checkpoints go that are not as they were written


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of a run, and the save that is under way."""

    orbax: ocp.training.Checkpointer
    saving: Any = None


@contextlib.contextmanager
def open_checkpoints(directory: Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints of a run; the newest `keep` stay. Leaving waits for a save under way.

    A save is made whole by a rename, with its checksums in it, and only then older ones go; so one that was cut off is
    never listed, and its remains are removed here. In a bucket, where nothing is renamed, it is whole when it has
    orbax's `commit_success.txt`, which is written after the checksums.

    Raises:
      UserError: a save failed.
    """
    directory = directory.absolute()

    def add_checksums() -> None:  # by the first process, when all have written their share and before the rename
        for unfinished in _unfinished(directory):
            integrity.write_checksums(unfinished, leave_out=(_METADATA,))

    context, newest = ocp.Context(), ocp.training.preservation_policies.LatestN(keep)
    context.async_options.post_finalization_callback = add_checksums
    orbax = ocp.training.Checkpointer(
        _for_orbax(directory), context=context, preservation_policy=newest, cleanup_tmp_directories=True
    )
    failed = True
    try:
        yield Checkpoints(orbax)
        failed = False
    except Exception as e:
        processes.end_if_a_peer_is_gone(e)  # closing would wait for it
        raise
    finally:
        try:
            with _saving(directory):
                orbax.close()
        finally:
            if failed and not isinstance(directory, BucketPath):  # a save that failed may have been writing until now
                _clear_unfinished(directory)


def set_aside_damaged(directory: Path) -> list[str]:
    """Check the newest checkpoint and, while it is damaged, move it out of the way: the newest sound one is then first.

    Every file is read once more; several processes share that. Every process calls it, before `open_checkpoints`.

    Returns:
      A line for each that was damaged: what was wrong and where it is now.
    """
    told: list[str] = []
    below = np.iinfo(np.int64).max
    while True:
        steps = [step for step in whole_checkpoints(directory) if step < below]
        newest = int(from_first(np.asarray(max(steps, default=-1), np.int32)))
        if newest < 0:
            return told
        where = directory / str(newest)
        wrong = _damage(where, _METADATA)
        if wrong is None:
            return told
        below = newest
        place = directory.parent / DAMAGED / str(newest)
        if jax.process_index() == 0:
            place.parent.mkdir(exist_ok=True)
            while place.exists():
                place = place.with_name(place.name + "-again")
            if isinstance(place, BucketPath):
                move_objects(where, place, first=(_COMMITTED,))
            else:
                where.rename(place)
        told.append(f"checkpoint {newest} is damaged ({wrong}); it is now {place}")


def whole_checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints in a directory by their number, damaged or not: all that were written to their end."""
    found = {int(p.name): p for p in directory.glob("*") if p.name.isdigit() and p.is_dir()}
    if isinstance(directory, BucketPath):
        return {step: path for step, path in found.items() if (path / _COMMITTED).is_file()}
    return found


def _unfinished(directory: Path) -> list[Path]:
    """The checkpoints that are being written, or were when a process ended."""
    if isinstance(directory, BucketPath):
        return [path for path in directory.glob("*") if path.is_dir() and not (path / _COMMITTED).is_file()]
    return list(directory.glob(f"*{_UNFINISHED}"))


def _for_orbax(directory: Path) -> Any:
    """A directory as orbax takes it: one in a bucket by its address, whose arrays tensorstore then reads and writes."""
    if isinstance(directory, BucketPath):
        prepare_libraries()
        return str(directory)
    return directory.absolute()


def _damage(directory: Path, *metadata: str) -> str | None:
    """What any process finds wrong with its share of a directory's files; `metadata` are JSON that has no checksum."""
    wrong = integrity.damage(directory, (jax.process_index(), jax.process_count()))
    for name in metadata:
        try:
            json.loads((directory / name).read_bytes())
        except (OSError, ValueError):
            wrong = wrong or f"{name} cannot be read"
    return (wrong or "as another process reports") if any_process(wrong is not None) else None


def latest_step(checkpoints: Checkpoints) -> int | None:
    """The step of the newest whole checkpoint."""
    newest = checkpoints.orbax.latest
    return None if newest is None else int(newest.step)


def save_checkpoint(checkpoints: Checkpoints, step: int, state: object) -> None:
    """Save `state` as checkpoint `step` in the background, unless it is there; a UserError if the last save failed."""
    if latest_step(checkpoints) != step:
        with _saving(checkpoints.orbax.directory):
            sync_appended()  # what a checkpoint holds is on record before it
            checkpoints.saving = checkpoints.orbax.save_async(step, state, force=True)


def check_save(checkpoints: Checkpoints) -> None:
    """Raise early the UserError of a save in the background that has failed."""
    if checkpoints.saving is not None:
        with _saving(checkpoints.orbax.directory), contextlib.suppress(TimeoutError):
            checkpoints.saving.result(timeout=0)
            checkpoints.saving = None


@contextlib.contextmanager
def _saving(directory: Any) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # of the file system, tensorstore, orbax: they have no parent in common
        if is_of_a_lost_peer(e):  # processes talk to each other in a save: it is not the disk
            raise
        if not str(directory).startswith("gs://"):  # the next start removes what is in a bucket
            _clear_unfinished(Path(directory))  # room for what else is written at the end
        raise UserError(
            f"{directory}: a checkpoint could not be saved ({_first_line(e)}); the earlier ones are kept: make room, "
            "then the same command resumes from the newest",
            code=SAVE_FAILED,
        ) from e


def _clear_unfinished(directory: Path) -> None:
    """Remove what a failed save left; its other threads may still be writing, so more than once."""
    for _ in range(20):
        unfinished = list(directory.glob(f"*{_UNFINISHED}"))
        for one in unfinished:
            shutil.rmtree(one, ignore_errors=True)
        if not unfinished:
            return
        time.sleep(0.1)


def restore(checkpoints: Checkpoints, step: int, abstract: Any) -> Any:
    """Restore a state with the shapes, dtypes and shardings of `abstract`, whatever mesh it was saved on.

    Raises:
      UserError: the checkpoint cannot be read, or does not hold such a state.
    """
    where = f"checkpoint {step} in {checkpoints.orbax.directory}"
    with _reading(where, "delete its directory to resume from an earlier one, or start in a new workdir"):
        return checkpoints.orbax.load(step, abstract)


def restore_part(directory: Path, abstract: Any) -> Any:
    """Of the checkpoint in `directory`, whose run may be going on, what `abstract` has; nothing else is read.

    Raises:
      UserError: it is damaged, or has no such part.
    """
    if wrong := _damage(directory, _METADATA):
        raise UserError(f"{directory} is damaged ({wrong}); the run's own command sets it aside and resumes before it")
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with _reading(str(directory), "give another run, or its export"), context:
        return ocp.load(_for_orbax(directory), abstract)


@contextlib.contextmanager
def _reading(what: str, mend: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError) as e:
        raise UserError(f"{what} cannot be restored ({_first_line(e)}); {mend}") from e


def save_tree(directory: Path, tree: Any) -> None:
    """Save a tree once (the reference of a run that made its own); a UserError if that fails."""
    with _saving(directory):
        ocp.save(_for_orbax(directory), tree, overwrite=True)
        if jax.process_index() == 0:
            integrity.write_checksums(directory)
        any_process(False)  # the others read the checksums next


def restore_tree(directory: Path, abstract: Any) -> Any:
    """Restore what `save_tree` saved as `restore` does; a UserError if it is damaged."""
    if wrong := _damage(directory):
        raise UserError(
            f"{directory} is damaged ({wrong}), and nothing else holds the reference that this run made; start again "
            "in a new workdir"
        )
    with _reading(str(directory), "start again in a new workdir"):
        return ocp.load(_for_orbax(directory), abstract)


def _first_line(e: BaseException) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
