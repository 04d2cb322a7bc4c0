"""Orbax checkpoints of a run: save, find, restore on any mesh.

A checkpoint is the train state; its number is the run's position. The reference's parameters are saved once, apart, and
only by a run that made them itself.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dpo_jax.errors import UserError

# Orbax reports every phase of every save; its warnings still show.
logging.getLogger("absl").addFilter(lambda record: record.levelno >= logging.WARNING or "orbax" not in record.pathname)


@contextlib.contextmanager
def open_checkpoints(directory: Path, keep: int) -> Iterator[ocp.training.Checkpointer]:
    """The checkpoints of a run; the newest `keep` stay. Leaving waits for a save under way.

    A save is made whole by a rename, so one that was cut off is never listed; its remains are removed here.
    """
    checkpointer = ocp.training.Checkpointer(
        directory.absolute(),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def latest_step(checkpointer: ocp.training.Checkpointer) -> int | None:
    """The step of the newest whole checkpoint."""
    newest = checkpointer.latest
    return None if newest is None else int(newest.step)


def save(checkpointer: ocp.training.Checkpointer, step: int, state: Any) -> None:
    """Save `state` as checkpoint `step`, unless it is there already. Writing goes on in the background."""
    if latest_step(checkpointer) != step:
        checkpointer.save_async(step, state, force=True)


def restore(checkpointer: ocp.training.Checkpointer, step: int, abstract: Any) -> Any:
    """Restore a state with the shapes, dtypes and shardings of `abstract`, whatever mesh it was saved on.

    Raises:
      UserError: the checkpoint cannot be read, or does not hold such a state.
    """
    try:
        return checkpointer.load(step, abstract)
    except (ValueError, OSError, KeyError) as e:
        first = _first_line(e)
        raise UserError(
            f"checkpoint {step} in {checkpointer.directory} cannot be restored ({first}); delete its directory to go "
            "on from an earlier one, or start in a new workdir"
        ) from e


def save_tree(directory: Path, tree: Any) -> None:
    """Save a tree once (the reference of a run that made its own)."""
    ocp.save(directory.absolute(), tree, overwrite=True)


def restore_tree(directory: Path, abstract: Any) -> Any:
    """Restore what `save_tree` saved, with the shapes, dtypes and shardings of `abstract`.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return ocp.load(directory.absolute(), abstract)
    except (ValueError, OSError, KeyError) as e:
        raise UserError(f"{directory} cannot be restored ({_first_line(e)}); start again in a new workdir") from e


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def abstract(tree: Any, shardings: Any) -> Any:
    """A tree's shapes and dtypes with shardings: what restoring needs."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
