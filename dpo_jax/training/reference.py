"""The reference of a run: its parameters, or its log-probabilities of every pair, computed once and kept in a file.

Training then needs no reference in memory.
"""

import dataclasses
import functools
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batches import Given, once_through, passed
from dpo_jax.config.settings import ReferenceOptions
from dpo_jax.data.cache.manifest import COMPUTED, CONTENT
from dpo_jax.data.files import fingerprint
from dpo_jax.data.split import Pairs
from dpo_jax.disk import digest, whole_file
from dpo_jax.errors import Stopped, UserError
from dpo_jax.model.config import Params
from dpo_jax.model.placement import Layout, abstract_trained, abstract_whole
from dpo_jax.parallel.mesh import any_process, from_first, replicated
from dpo_jax.rows.batch import REFERENCE_FIELDS, Batch
from dpo_jax.rows.pipeline import StepSource
from dpo_jax.rows.schedule import Schedule
from dpo_jax.rows.shape import RowShape
from dpo_jax.training import checkpoint
from dpo_jax.training.setup import Run
from dpo_jax.training.step import make_logps_step, make_reference_sync
from dpo_jax.weights.hub import ModelFiles
from dpo_jax.weights.load import read_model

MOVING = jnp.dtype("float32")  # of a reference that follows the policy: small changes would be lost in bfloat16
SAVE_SECONDS = 120  # between saves of a pass: a run that is killed computes no more than this again
AGREE_BATCHES = 16  # between the times when processes ask each other whether to stop


def reference_params(run: Run, start: Params | None) -> Params:
    """The reference's parameters: those named, else the policy's when DPO starts (`start`, None in a resumed run).

    Over a frozen base only what differs from it is needed: nothing, or the adapters after the SFT phase.
    """
    moves, after_sft = run.settings.reference.moves, run.settings.sft_steps > 0
    if run.base and not after_sft and run.reference_files is None:
        return {}
    files = run.reference_files or (None if after_sft else run.policy.files)
    if files is not None:
        return read_reference(files, run.layout, moves=moves)
    if moves:  # only asked for when DPO starts: checkpoints hold it afterwards
        assert start is not None
        return _copied(start, MOVING)
    return own_reference(run.workdir / "reference", start, run.layout)


def read_reference(files: ModelFiles, layout: Layout, *, moves: bool) -> Params:
    """A named model as the reference, in the compute dtype (see `check_reference`); one that `moves` in `MOVING`."""
    return read_model(files, layout.config, layout.reference_shardings, MOVING if moves else layout.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _copied(params: Params, dtype: Any) -> Params:
    """A copy in another dtype; a real one even in the same dtype, as the original is donated later."""
    return jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params)


def own_reference(saved: Path, params: Params | None, layout: Layout) -> Params:
    """The reference that the run made itself: kept in the directory `saved`, as nothing else can bring it back.

    It is what is trained when DPO starts (`params`, None in a resumed run): under adapters those after the SFT phase,
    over the same base.

    Raises:
      UserError: it is not there any more.
    """
    if params is not None:
        checkpoint.save_tree(saved, _copied(params, layout.dtype))
    if not saved.exists():
        raise UserError(f"{saved}, the reference that this run made, is gone; start again in a new workdir")
    whole = layout.lora is None
    return checkpoint.restore_tree(saved, (abstract_whole if whole else abstract_trained)(layout, layout.dtype))


def abstract_reference(layout: Layout) -> Any:
    """Shapes, dtype and shardings of a reference that moves: what restoring one needs."""
    return abstract_trained(layout, MOVING)


def moving_step(
    options: ReferenceOptions, layout: Layout, update: Callable[..., Any], start: int
) -> Callable[..., Any]:
    """The step of TR-DPO: the reference is part of the state, and moves towards the policy now and then.

    `update` is (state, reference, batch, shape) → state, metrics; `start` updates were made before.
    """
    sync, numbers = make_reference_sync(options.sync_alpha, shardings=layout.shardings), itertools.count(start + 1)

    def step(tree: dict[str, Any], *rows: Any) -> tuple[dict[str, Any], Any]:
        reference = tree["reference"]
        state, metrics = update(tree["state"], reference, *rows)
        if options.sync_every and next(numbers) % options.sync_every == 0:
            reference = sync(reference, state.params)
        return {"state": state, "reference": reference}, metrics

    return step


def followed(tree: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The tree of a state and its reference, where the reference is now the policy."""
    sync = make_reference_sync(1.0, shardings=layout.shardings)
    return tree | {"reference": sync(tree["reference"], tree["state"].params)}


@dataclasses.dataclass(frozen=True)
class Place:
    """The file with the values of one reference for one cache of pairs: float32 `[pairs, 2, fields]`.

    Chosen and rejected have so many `fields` each (of `REFERENCE_FIELDS`), NaN where not computed yet.
    """

    path: Path
    pairs: int
    fields: int


def find_place(run: Run, start_anew: bool) -> Place:
    """The file for a run's reference.

    Its name is a hash of all that decides the values: the reference's files, the pairs' cache, the dtypes of the
    computation. What differs in any of these is another file, so an old one is never read by mistake. The values of a
    reference that the run made stay in the run's directory; with `start_anew` it is another one than before, and its
    old values go.

    Raises:
      UserError: the model's files cannot be read.
    """
    s, cache = run.settings, run.data.train.cache
    model = run.reference_files or (None if s.sft_steps else run.policy.files)
    who: Any = "this run"
    if model is not None:
        who = [{**fingerprint(str(file)), "path": file.name} for file in model.deciding()]
    dtypes, ld_alpha = f"{run.layout.dtype} over {run.layout.base_dtype}", s.objective.ld_alpha
    # By content, not by build: a cache that was damaged and made anew has the same pairs.
    decides = {"model": who, "pairs": cache.manifest[CONTENT], "dtypes": dtypes, "ld_alpha": ld_alpha}
    name = COMPUTED.replace("*", digest(json.dumps(decides, sort_keys=True)))
    path = (run.workdir if model is None else Path(cache.directory)) / name
    if model is None and start_anew and jax.process_index() == 0:
        path.unlink(missing_ok=True)
    return Place(path, len(cache), 1 if ld_alpha == 1 else len(REFERENCE_FIELDS))


def read_values(where: Place) -> tuple[np.ndarray, str]:
    """What is known, NaN for the rest; and why a file that is there counts as none, empty if it does not.

    The file is a zip archive, as NumPy writes it, with a checksum of its content: a flipped bit is noticed.
    """
    shape, why = (where.pairs, 2, where.fields), ""
    try:
        held: Any = io.BytesIO(where.path.read_bytes())
        with np.load(held, allow_pickle=False) as archive:
            values = archive["values"]
        if values.shape == shape and values.dtype == np.float32:
            return values, ""
        why = f"it holds {values.dtype} {list(values.shape)}, not float32 {list(shape)}"
    except FileNotFoundError:
        if list(where.path.parent.glob("reference-*.npy")):
            why = "there are only files without checksums, of an earlier version"
    except UserError:  # of a bucket that does not answer, which says nothing about the file
        raise
    except Exception as error:  # of zipfile, zlib and NumPy, whatever a damaged archive makes them raise
        why = f"it is damaged ({type(error).__name__}: {error})"
    return np.full(shape, np.nan, np.float32), why


def write_values(where: Place, values: np.ndarray) -> str:
    """Keep the values, whole or not at all; returns why the directory could not be written, empty if it could."""
    try:
        with whole_file(where.path) as file:
            np.savez(file, values=values)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def kept_reference(run: Run, schedule: Schedule, steps: int, start: Params | None) -> np.ndarray | None:
    """The reference's values for every pair that the run meets, by pair of the cache; None unless `reference_cache`.

    What is not known from an earlier run is computed; the reference's parameters are freed again.

    Raises:
      Stopped: a signal came; what is computed is kept.
    """
    train = run.data.train
    if not run.settings.reference.cache:
        return None
    where = find_place(run, start_anew=start is not None)
    met = np.unique(np.concatenate([placed[placed >= 0] for _, placed in map(schedule.place, range(steps))]))
    needed = np.union1d(train.index[met], run.data.evaluation.index)
    # Hosts may have disks of their own, and must agree on what is to be computed together.
    values, why = read_values(where)
    if why:
        run.writer.message(f"warning: {where.path}: {why}; the reference is computed anew")
    values = from_first(values)
    missing = needed[np.isnan(values[needed]).any((1, 2))]
    run.writer.message(f"reference: {len(needed) - len(missing):,} pairs known, {len(missing):,} to compute")
    if not len(missing):
        return values
    began = saved = time.perf_counter()
    computed = computed_values(run, reference_params(run, start), dataclasses.replace(train, index=missing))
    for n, (ids, theirs) in enumerate(computed):
        values[missing[ids]] = theirs
        # Processes agree now and then, as each time they wait for each other.
        agreeing = jax.process_count() == 1 or n % AGREE_BATCHES == 0
        stopping = agreeing and any_process(run.stop.is_set())
        if (stopping or time.perf_counter() - saved > SAVE_SECONDS) and jax.process_index() == 0:
            write_values(where, values)
            saved = time.perf_counter()
        if stopping:
            raise Stopped
    failed = write_values(where, values) if jax.process_index() == 0 else ""
    seconds = time.perf_counter() - began
    run.writer.message(
        f"reference: {len(missing):,} pairs computed in {seconds:.1f} s"
        + (f"; not kept, as {where.path.parent} cannot be written ({failed})" if failed else "")
    )
    return values


def held_out_reference(run: Run, params: Params | None, eval_step: Callable[..., Any]) -> Given:
    """The reference's values of the held-out pairs: computed once, as they are the same at every evaluation.

    `eval_step` is what evaluates the policy, and asks a reference on the devices, too: nothing more is compiled.
    """
    layout, batch, pairs = run.layout, run.settings.batch, run.data.evaluation
    if layout.options.reference_offload:
        computed = computed_values(run, params, pairs)
    else:
        fields = 1 if run.settings.objective.ld_alpha == 1 else len(REFERENCE_FIELDS)
        blank = _by_name(np.zeros((len(pairs), 2, fields), np.float32))  # what is not known yet is not read
        source = once_through(pairs, batch.size, batch.microbatches, layout, blank)

        def step(rows: Batch[jax.Array], shape: RowShape) -> list[jax.Array]:
            values, _ = eval_step(params, None, rows, shape, base=run.base)
            return [x for x in (values.logps, values.whole) if x is not None]

        computed = _by_pair(step, source, layout)
    ids, found = map(np.concatenate, zip(*computed, strict=True))
    return _by_name(found[np.argsort(ids)])


def given_reference(values: np.ndarray | None, pairs: Pairs) -> Given:
    """The reference's values of `pairs` as a batch has them."""
    return {} if values is None else _by_name(values[pairs.index])


def computed_values(run: Run, params: Params | None, pairs: Pairs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The values of `pairs`, batch by batch: positions in `pairs`, int64 `[n]`, and float32 `[n, 2, fields]`."""
    layout, batch = run.layout, run.settings.batch
    step = make_logps_step(run.models[1], out_shardings=replicated(layout.mesh), **layout.step_options)
    logps = lambda batch, shape: step(params, batch, shape, base=run.base)
    yield from _by_pair(logps, once_through(pairs, batch.size, batch.microbatches, layout), layout)


def _by_pair(
    step: Callable[..., list[jax.Array]], source: StepSource, layout: Layout
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `step` says of every pair of a source, as `computed_values` gives it."""
    for placed, values in passed(step, source, layout.mesh, "reference"):
        yield placed[placed >= 0], np.stack(values, axis=-1)[placed >= 0]


def _by_name(values: np.ndarray) -> Given:
    """`[pairs, 2, F]` → `[pairs, 2]` by the name that a batch has for each."""
    return {name: values[..., number] for number, name in enumerate(REFERENCE_FIELDS[: values.shape[-1]])}
