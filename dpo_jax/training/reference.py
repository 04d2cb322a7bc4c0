"""The reference of a run: its parameters, or what they said about every pair, computed once."""

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import numpy as np

from dpo_jax.data.split import Pairs
from dpo_jax.model import placement as policy
from dpo_jax.model.params import Params
from dpo_jax.parallel.mesh import any_process, from_first, replicated
from dpo_jax.rows.pipeline import Schedule
from dpo_jax.training import reference_cache
from dpo_jax.training.loop import Stopped
from dpo_jax.training.setup import Run, once_through
from dpo_jax.training.step import REFERENCE_FIELDS, make_logps_step
from dpo_jax.weights import hub

SAVE_SECONDS = 120  # between saves on the way: a run that is killed computes no more than this again
AGREE_BATCHES = 16  # between the times when processes ask each other whether to stop


def load_reference(run: Run, start: Params | None) -> Params:
    """The reference's parameters: those named, else the policy's when DPO starts (`start`, None in a resumed run).

    Over a frozen base only what differs from it is needed: nothing, or the adapters after the SFT phase.
    """
    c, moves = run.c, run.c["reference_sync_steps"] > 0
    if c["reference"]:
        return policy.load_reference(hub.resolve_model(c["reference"], what="reference"), run.layout, moves=moves)
    if run.base and not c["sft_steps"]:
        return {}
    if run.policy.directory is not None and not c["sft_steps"]:
        return policy.load_reference(run.policy.directory, run.layout, moves=moves)
    if moves:  # only asked for when DPO starts: checkpoints hold it afterwards
        assert start is not None
        return policy.moving_reference(start)
    return policy.own_reference(run.workdir / "reference", start, run.layout)


def kept_reference(run: Run, plan: Schedule, steps: int, start: Params | None) -> np.ndarray | None:
    """The reference's values for every pair that the run meets, by pair of the cache; None unless `reference_cache`.

    What is not known from an earlier run is computed; the reference's parameters are freed again.

    Raises:
      Stopped: SIGTERM came; what is computed is kept.
    """
    c = run.c
    if not c["reference_cache"]:
        return None
    named = hub.resolve_model(c["reference"], what="reference") if c["reference"] else run.policy.directory
    model = None if c["sft_steps"] and not c["reference"] else named
    cache = run.data.train.cache
    dtypes = f"{run.layout.dtype} over {run.layout.base_dtype}"
    where = reference_cache.find_place(
        cache, model, run.workdir, dtypes=dtypes, ld_alpha=c["ld_alpha"], start_anew=start is not None
    )
    met = np.unique(np.concatenate([placed[placed >= 0] for _, placed in map(plan.place, range(steps))]))
    needed = np.union1d(run.data.train.index[met], run.data.evaluation.index)
    # Hosts may have disks of their own, and must agree on what is to be computed together.
    values = from_first(reference_cache.load(where))
    missing = needed[np.isnan(values[needed]).any((1, 2))]
    run.writer.message(f"reference: {len(needed) - len(missing):,} pairs known, {len(missing):,} to compute")
    if not len(missing):
        return values
    params = load_reference(run, start)
    pairs = dataclasses.replace(run.data.train, index=missing)
    began = saved = time.perf_counter()
    for n, (ids, computed) in enumerate(_computed(run, params, pairs)):
        values[missing[ids]] = computed
        # Processes agree now and then, as each time they wait for each other.
        agreeing = jax.process_count() == 1 or n % AGREE_BATCHES == 0
        stopping = agreeing and any_process(run.stop.is_set())
        if (stopping or time.perf_counter() - saved > SAVE_SECONDS) and jax.process_index() == 0:
            reference_cache.save(where, values)
            saved = time.perf_counter()
        if stopping:
            raise Stopped
    kept = jax.process_index() > 0 or reference_cache.save(where, values)
    seconds = time.perf_counter() - began
    run.writer.message(
        f"reference: {len(missing):,} pairs computed in {seconds:.1f} s"
        + ("" if kept else f"; not kept, {where.path.parent} cannot be written")
    )
    return values


def held_out_reference(run: Run, params: Params | None) -> dict[str, np.ndarray]:
    """The reference's values of the held-out pairs: computed once, as it says the same at every evaluation."""
    parts = list(_computed(run, params, run.data.evaluation))
    ids = np.concatenate([ids for ids, _ in parts])
    return _by_name(np.concatenate([values for _, values in parts])[np.argsort(ids)])


def given_reference(values: np.ndarray | None, pairs: Pairs) -> dict[str, np.ndarray]:
    """The reference's values of `pairs` as a batch has them."""
    return {} if values is None else _by_name(values[pairs.index])


def _computed(run: Run, params: Params | None, pairs: Pairs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    layout = run.layout
    step = make_logps_step(
        run.reference_logps,
        compute_dtype=layout.dtype,
        out_shardings=replicated(layout.mesh),
        compiler_options=layout.compiler_options,
    )
    step = functools.partial(step, base=run.base)
    return reference_cache.compute(step, params, once_through(run, pairs), layout.mesh)


def _by_name(values: np.ndarray) -> dict[str, np.ndarray]:
    """`[pairs, 2, F]` → `[pairs, 2]` by the name that a batch has for each."""
    return {name: values[..., number] for number, name in enumerate(REFERENCE_FIELDS[: values.shape[-1]])}
