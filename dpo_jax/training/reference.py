"""The reference of a run: its parameters, or its log-probabilities of every pair, computed once."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.config.settings import ReferenceOptions
from dpo_jax.data.split import Pairs
from dpo_jax.errors import UserError
from dpo_jax.model.params import Params
from dpo_jax.model.placement import Layout, abstract_trained, abstract_whole
from dpo_jax.parallel.mesh import any_process, from_first, replicated
from dpo_jax.rows.batch import REFERENCE_FIELDS
from dpo_jax.rows.schedule import Schedule
from dpo_jax.training import checkpoint, reference_cache
from dpo_jax.training.batches import Given, once_through
from dpo_jax.training.loop import Stopped
from dpo_jax.training.setup import Run
from dpo_jax.training.step import make_logps_step, make_reference_sync
from dpo_jax.weights.huggingface import load_weights

MOVING = jnp.dtype("float32")  # of a reference that follows the policy: small changes would be lost in bfloat16
SAVE_SECONDS = 120  # between saves of a pass: a run that is killed computes no more than this again
AGREE_BATCHES = 16  # between the times when processes ask each other whether to stop


def reference_params(run: Run, start: Params | None) -> Params:
    """The reference's parameters: those named, else the policy's when DPO starts (`start`, None in a resumed run).

    Over a frozen base only what differs from it is needed: nothing, or the adapters after the SFT phase.
    """
    moves, after_sft = run.settings.reference.moves, run.settings.sft_steps > 0
    if run.base and not after_sft and run.reference_directory is None:
        return {}
    directory = run.reference_directory or (None if after_sft else run.policy.directory)
    if directory is not None:
        return read_reference(directory, run.layout, moves=moves)
    if moves:  # only asked for when DPO starts: checkpoints hold it afterwards
        assert start is not None
        return _copied(start, MOVING)
    return own_reference(run.workdir / "reference", start, run.layout)


def read_reference(directory: Path, layout: Layout, *, moves: bool) -> Params:
    """A named model as the reference, in the compute dtype (see `check_reference`); one that `moves` in `MOVING`."""
    return load_weights(directory, layout.config, layout.reference_shardings, MOVING if moves else layout.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _copied(params: Params, dtype: Any) -> Params:
    """A copy in another dtype; a real one even in the same dtype, as the original is donated later."""
    return jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params)


def own_reference(saved: Path, params: Params | None, layout: Layout) -> Params:
    """The reference that the run made itself: kept in `saved`, as nothing else can bring it back.

    Under adapters it is those after the SFT phase, over the same base.

    Args:
      saved: its directory.
      params: what is trained when DPO starts, to be saved; None in a resumed run.
      layout: of the model.

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

    Args:
      options: how far it moves, and how often.
      layout: of the model.
      update: (state, reference, batch, shape) → state, metrics.
      start: updates made before.
    """
    sync, numbers = make_reference_sync(options.sync_alpha, shardings=layout.shardings), itertools.count(start + 1)

    def step(tree: dict[str, Any], *rows: Any) -> tuple[dict[str, Any], Any]:
        reference = tree["reference"]
        state, metrics = update(tree["state"], reference, *rows)
        if next(numbers) % options.sync_every == 0:
            reference = sync(reference, state.params)
        return {"state": state, "reference": reference}, metrics

    return step


def kept_reference(run: Run, schedule: Schedule, steps: int, start: Params | None) -> np.ndarray | None:
    """The reference's values for every pair that the run meets, by pair of the cache; None unless `reference_cache`.

    What is not known from an earlier run is computed; the reference's parameters are freed again.

    Raises:
      Stopped: SIGTERM came; what is computed is kept.
    """
    s, train = run.settings, run.data.train
    if not s.reference.cache:
        return None
    where = reference_cache.find_place(
        train.cache,
        run.reference_directory or (None if s.sft_steps else run.policy.directory),
        run.workdir,
        dtypes=f"{run.layout.dtype} over {run.layout.base_dtype}",
        ld_alpha=s.objective.ld_alpha,
        start_anew=start is not None,
    )
    met = np.unique(np.concatenate([placed[placed >= 0] for _, placed in map(schedule.place, range(steps))]))
    needed = np.union1d(train.index[met], run.data.evaluation.index)
    # Hosts may have disks of their own, and must agree on what is to be computed together.
    values = from_first(reference_cache.read_values(where))
    missing = needed[np.isnan(values[needed]).any((1, 2))]
    run.writer.message(f"reference: {len(needed) - len(missing):,} pairs known, {len(missing):,} to compute")
    if not len(missing):
        return values
    began = saved = time.perf_counter()
    computed = _computed(run, reference_params(run, start), dataclasses.replace(train, index=missing))
    for n, (ids, theirs) in enumerate(computed):
        values[missing[ids]] = theirs
        # Processes agree now and then, as each time they wait for each other.
        agreeing = jax.process_count() == 1 or n % AGREE_BATCHES == 0
        stopping = agreeing and any_process(run.stop.is_set())
        if (stopping or time.perf_counter() - saved > SAVE_SECONDS) and jax.process_index() == 0:
            reference_cache.write_values(where, values)
            saved = time.perf_counter()
        if stopping:
            raise Stopped
    kept = jax.process_index() > 0 or reference_cache.write_values(where, values)
    seconds = time.perf_counter() - began
    run.writer.message(
        f"reference: {len(missing):,} pairs computed in {seconds:.1f} s"
        + ("" if kept else f"; not kept, {where.path.parent} cannot be written")
    )
    return values


def held_out_reference(run: Run, params: Params | None) -> Given:
    """The reference's values of the held-out pairs: computed once, as they are the same at every evaluation."""
    parts = list(_computed(run, params, run.data.evaluation))
    ids = np.concatenate([ids for ids, _ in parts])
    return _by_name(np.concatenate([values for _, values in parts])[np.argsort(ids)])


def given_reference(values: np.ndarray | None, pairs: Pairs) -> Given:
    """The reference's values of `pairs` as a batch has them."""
    return {} if values is None else _by_name(values[pairs.index])


def _computed(run: Run, params: Params | None, pairs: Pairs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    layout, batch = run.layout, run.settings.batch
    step = make_logps_step(run.models[1], out_shardings=replicated(layout.mesh), **layout.step_options)
    source = once_through(pairs, batch.size, batch.microbatches, layout)
    logps = lambda batch, shape: step(params, batch, shape, base=run.base)
    return reference_cache.computed_values(logps, source, layout.mesh)


def _by_name(values: np.ndarray) -> Given:
    """`[pairs, 2, F]` → `[pairs, 2]` by the name that a batch has for each."""
    return {name: values[..., number] for number, name in enumerate(REFERENCE_FIELDS[: values.shape[-1]])}
