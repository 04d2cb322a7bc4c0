"""Orbax checkpoints of a run: save, find, restore on any mesh; with checksums, as orbax has none of the contents.

A checkpoint is the train state; its number is the run's position. The reference's parameters are saved once, apart, and
only by a run that made them itself.
"""

import contextlib
import dataclasses
import errno
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from typing_extensions import TypedDict

from dpo_jax.bucket.client import BucketError, prepare_libraries
from dpo_jax.bucket.path import SCHEME, BucketPath
from dpo_jax.bucket.tree import COMMITTED, is_committed, move_objects, remove_objects
from dpo_jax.disk import is_full, read_json, write_json
from dpo_jax.errors import BAD_INPUT, SAVE_FAILED, UserError
from dpo_jax.parallel import processes
from dpo_jax.parallel.mesh import any_process, from_first
from dpo_jax.parallel.processes import is_of_a_lost_peer
from dpo_jax.parallel.watchdog import LONGER, beat, watch
from dpo_jax.records.directory import DAMAGED, MADE_WITH, checkpoint_directories, checkpoint_number
from dpo_jax.records.shapes import MadeWith
from dpo_jax.training import integrity
from dpo_jax.training.workdir import first_only

# Orbax reports every phase of every save, and its own traceback of a failed one, which `_saving` reports in a line.
logging.getLogger("absl").addFilter(lambda record: record.levelno == logging.WARNING or "orbax" not in record.pathname)

_UNFINISHED = ".orbax-checkpoint-tmp"
_LAST_SAVE = "waiting for the last checkpoint to be written"
_METADATA = "_CHECKPOINT_METADATA"  # of orbax: it gets its last time stamp after our checksums
_WRITTEN_LAST = (_METADATA, COMMITTED)  # after our checksums: times and a mark, no numbers
_TAKEN_FOR_A_STEP = re.compile(r"[\d-]+")  # in any script: what orbax would read as a number


class _Metadata(TypedDict, total=False):
    """What orbax reads of its own file before it restores anything."""

    item_handlers: dict[str, str] | str | None
    metrics: dict[str, Any] | None
    performance_metrics: dict[str, Any] | None
    init_timestamp_nsecs: int | None
    commit_timestamp_nsecs: int | None
    custom_metadata: dict[str, Any] | None


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of a run, and the save that is under way.

    Attributes:
      made_with: called when a save begins: what its checkpoint is made with, `MadeWith` without the number.
      about: what was said of those that are not finished yet, by their numbers.
    """

    orbax: ocp.training.Checkpointer
    saving: Any = None
    made_with: Callable[[], Mapping[str, Any]] = dict
    about: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def open_checkpoints(directory: Path, keep: int, stuck_after: float = 0.0) -> Iterator[Checkpoints]:
    """The checkpoints of a run; the newest `keep` stay. Leaving waits for a save under way.

    A save that does not end then ends the process as everything does that is stuck, after `LONGER` times `stuck_after`
    seconds (0: never).

    A save is made whole by a rename, with its checksums in it, and only then older ones go; so one that was cut off is
    never listed, and its remains are removed here. In a bucket, where nothing is renamed, it is whole when it has
    orbax's `commit_success.txt`, which is written after the checksums.

    Raises:
      UserError: a save failed, or the directory can be no run's checkpoints.
    """
    directory = directory.absolute()
    about: dict[str, Mapping[str, Any]] = {}

    def complete() -> None:  # by the first process, when all have written their share and before the rename
        for unfinished in _unfinished(directory):
            if said := about.pop(unfinished.name.removesuffix(_UNFINISHED), None):
                write_json(unfinished / MADE_WITH, said)
            integrity.write_checksums(unfinished, leave_out=_WRITTEN_LAST)

    context, newest = ocp.Context(), ocp.training.preservation_policies.LatestN(keep)
    context.async_options.post_finalization_callback = complete
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, and is to be a directory; move it elsewhere")
    try:
        if isinstance(directory, BucketPath) and jax.process_index() == 0:
            for cut_off in _unfinished(directory):
                remove_objects(cut_off)
        orbax = ocp.training.Checkpointer(
            _for_orbax(directory), context=context, preservation_policy=newest, cleanup_tmp_directories=True
        )
    except BucketError:
        raise
    except Exception as e:  # of orbax and the file system: they have no parent in common
        if is_of_a_lost_peer(e):
            raise
        code = SAVE_FAILED if is_full(e) else BAD_INPUT
        mend = "make room" if is_full(e) else "restore it, or use another --workdir"
        raise UserError(f"{directory}: cannot be opened ({_first_line(e)}); {mend}", code=code) from e
    failed = True
    try:
        yield Checkpoints(orbax, about=about)
        failed = False
    except Exception as e:
        processes.end_if_a_peer_is_gone(e)  # closing would wait for it
        raise
    finally:
        try:
            with _saving(directory), watch(stuck_after):
                beat(_LAST_SAVE, LONGER)
                orbax.close()
        finally:
            if failed and not isinstance(directory, BucketPath):  # a save that failed may have been writing until now
                _clear_unfinished(directory)


def set_aside_damaged(directory: Path) -> list[str]:
    """Check the newest checkpoint and, while it is damaged, move it out of the way: the newest sound one is then first.

    What only looks like a checkpoint by its name goes there, too. Every file is read once more; several processes share
    that. Every process calls it, before `open_checkpoints`.

    Returns:
      A line for each that was moved: what was wrong and where it is now.

    Raises:
      UserError: one cannot be moved.
    """
    told: list[str] = []

    def set_aside_misread() -> None:
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():
            if not is_committed(path):
                continue
            number = checkpoint_number(path.name) if path.is_dir() else None
            if number is None and (path.name.isdigit() or _TAKEN_FOR_A_STEP.fullmatch(path.name)):
                told.append(f"{path} is no checkpoint; it is now {_move_aside(path)}")
            elif number is not None and (wrong := _misread(path)):  # orbax reads this of all, and ends with an error
                told.append(f"checkpoint {number} is damaged ({wrong}); it is now {_move_aside(path)}")

    first_only(set_aside_misread)
    while True:
        newest = max(checkpoint_directories(directory.parent), default=-1) if jax.process_index() == 0 else -1
        newest = int(from_first(np.asarray(newest, np.int32)))
        if newest < 0:
            return told
        where = directory / str(newest)
        wrong = _damage_of_checkpoint(where)
        if wrong is None:
            return told
        told.append(f"checkpoint {newest} is damaged ({wrong}); it {_set_aside(where)}")


def _set_aside(path: Path) -> str:
    """The first process moves a checkpoint; what became of it, as this process knows it."""
    places: list[Path] = []
    first_only(lambda: places.append(_move_aside(path)))
    return f"is now {places[0]}" if places else "is set aside"


def _unfinished(directory: Path) -> list[Path]:
    """The checkpoints that are being written, or were when a process ended."""
    if isinstance(directory, BucketPath):
        return [path for path in directory.iterdir() if path.is_dir() and not is_committed(path)]
    return list(directory.glob(f"*{_UNFINISHED}"))


def _for_orbax(directory: Path) -> Any:
    """A directory as orbax takes it: one in a bucket by its address, whose arrays tensorstore then reads and writes."""
    if isinstance(directory, BucketPath):
        prepare_libraries()
        return str(directory)
    return directory.absolute()


def _move_aside(path: Path) -> Path:
    """Move what is in `checkpoints/` to `damaged/`, and return where it is."""
    place = path.parent.parent / DAMAGED / path.name
    try:
        place.parent.mkdir(exist_ok=True)
        while place.exists():
            place = place.with_name(place.name + "-again")
        if isinstance(place, BucketPath):
            move_objects(path, place, first=(COMMITTED,))
        else:
            path.rename(place)
    except OSError as e:
        raise UserError(f"{path} cannot be used, nor moved to {place} ({e.strerror}); move it elsewhere") from None
    return place


def _damage_of_checkpoint(directory: Path) -> str | None:
    """What any process finds wrong with its share of a checkpoint's files."""
    return _of_any_process(_misread(directory) or _damage(directory, _WRITTEN_LAST))


def _misread(directory: Path) -> str | None:
    """What is wrong with the small files of a checkpoint that say what it is."""
    if not (directory / integrity.NAME).exists():
        return f"there is no {integrity.NAME}"
    for name, shape in ((_METADATA, _Metadata), (MADE_WITH, MadeWith)):
        if name == MADE_WITH and not (directory / name).exists():  # of an older version
            continue
        try:
            held = read_json(directory / name, shape=shape)
        except BucketError:  # which says nothing about the file
            raise
        except UserError:
            return f"{name} cannot be read"
        if str(held.get("step", directory.name)) != directory.name:
            return f"it was written as checkpoint {held['step']}"
    return None


def _damage(directory: Path, leave_out: tuple[str, ...] = ()) -> str | None:
    """What this process finds wrong with its share of a directory's files."""
    return integrity.damage(directory, (jax.process_index(), jax.process_count()), leave_out)


def _of_any_process(wrong: str | None) -> str | None:
    return (wrong or "as another process reports") if any_process(wrong is not None) else None


def records_made_with(directory: Path) -> dict[str, Any]:
    """By file, what there was of records when a checkpoint was made, see `RecordFile.held`; {}: it is not known."""
    path = directory / MADE_WITH
    return read_json(path, shape=MadeWith).get("records", {}) if path.exists() else {}


def latest_step(checkpoints: Checkpoints) -> int | None:
    """The step of the newest whole checkpoint."""
    newest = checkpoints.orbax.latest
    return None if newest is None else int(newest.step)


def save_checkpoint(checkpoints: Checkpoints, step: int, state: object) -> None:
    """Save `state` as checkpoint `step` in the background, unless it is there; a UserError if the last save failed."""
    if latest_step(checkpoints) != step:
        checkpoints.about[str(step)] = {"step": step, **checkpoints.made_with()}
        with _saving(checkpoints.orbax.directory):
            checkpoints.saving = checkpoints.orbax.save_async(step, state, force=True)


def check_save(checkpoints: Checkpoints) -> None:
    """Raise early the UserError of a save in the background that has failed."""
    if checkpoints.saving is not None:
        with _saving(checkpoints.orbax.directory), contextlib.suppress(TimeoutError):
            checkpoints.saving.result(timeout=0)
            checkpoints.saving = None


def finish_saving(checkpoints: Checkpoints, stuck_after: float) -> None:
    """Wait until a save under way is whole and older checkpoints are gone; a UserError if it fails.

    A save that does not end then ends the process, as in `open_checkpoints`.
    """
    if checkpoints.saving is not None:
        with _saving(checkpoints.orbax.directory), watch(stuck_after):
            beat(_LAST_SAVE, LONGER)
            checkpoints.saving.result()
        checkpoints.saving = None


@contextlib.contextmanager
def _saving(directory: Any) -> Iterator[None]:
    try:
        yield
    except BucketError:
        raise
    except Exception as e:  # of the file system, tensorstore, orbax: they have no parent in common
        if is_of_a_lost_peer(e):  # processes talk to each other in a save: it is not the disk
            raise
        if str(directory).startswith(SCHEME):  # there the next start removes what is cut off
            mend = "see that the bucket can be written"
        else:
            mend = _mend(e)
            _clear_unfinished(Path(directory))  # room for what else is written at the end
        raise UserError(
            f"{directory}: a checkpoint could not be saved ({_first_line(e)}); the earlier ones are kept: {mend}, "
            "then the same command resumes from the newest",
            code=SAVE_FAILED,
        ) from e


def _mend(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return "make the directory writable" if number in (errno.EACCES, errno.EPERM, errno.EROFS) else "make room"


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
    if wrong := _damage_of_checkpoint(directory):
        raise UserError(f"{directory} is damaged ({wrong}); the run's own command sets it aside and resumes before it")
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with _reading(str(directory), "give another run, or its export"), context:
        return ocp.load(_for_orbax(directory), abstract)


@contextlib.contextmanager
def _reading(what: str, mend: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # of the devices
        raise
    except Exception as e:  # of the file system, tensorstore, orbax: they have no parent in common
        raise UserError(f"{what} cannot be restored ({_first_line(e)}); {mend}") from e


def save_tree(directory: Path, tree: Any) -> None:
    """Save a tree once (the reference of a run that made its own); a UserError if that fails."""
    # Of several processes orbax sends words between devices, which a phase's guard would refuse.
    with _saving(directory), jax.transfer_guard_host_to_device("allow"):
        ocp.save(_for_orbax(directory), tree, overwrite=True)
        if jax.process_index() == 0:
            integrity.write_checksums(directory)
        any_process(False)  # the others read the checksums next


def restore_tree(directory: Path, abstract: Any) -> Any:
    """Restore what `save_tree` saved as `restore` does; a UserError if it is damaged."""
    if wrong := _of_any_process(_damage(directory)):
        raise UserError(
            f"{directory} is damaged ({wrong}), and nothing else holds the reference that this run made; start again "
            "in a new workdir"
        )
    with _reading(str(directory), "start again in a new workdir"):
        return ocp.load(_for_orbax(directory), abstract)


def _first_line(e: BaseException) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
