"""A schedule's steps as the loop takes them: read ahead, built into rows, placed on the mesh."""

from collections.abc import Iterator, Mapping

import numpy as np
from jax.sharding import Mesh

from dpo_jax.model.attention.dense import Slots
from dpo_jax.model.placement import Layout
from dpo_jax.parallel.mesh import local_rows, to_global
from dpo_jax.parallel.watchdog import awaited
from dpo_jax.rows.pipeline import PairSource, Schedule, StepSource, batches, make_schedule
from dpo_jax.rows.schedule import Order, RowShape
from dpo_jax.training.loop import Item

Given = Mapping[str, np.ndarray]  # more of every pair, by the name that a batch has for it


def step_source(
    schedule: Schedule, mesh: Mesh, steps: int, microbatches: int, given: Given | None = None
) -> StepSource:
    """The rows of the first `steps` steps that this process loads."""
    per_micro = {shape.rows // microbatches for shape in schedule.shapes}
    return StepSource(schedule, microbatches, {n: local_rows(mesh, n) for n in per_micro}, steps, given or {})


def once_through(
    pairs: PairSource, batch_size: int, microbatches: int, layout: Layout, given: Given | None = None
) -> StepSource:
    """Every one of `pairs` once."""
    limits, order = layout.row_limits(microbatches), Order(drop_remainder=False)
    schedule = make_schedule(pairs, min(batch_size, len(pairs)), limits, order)
    return step_source(schedule, layout.mesh, schedule.steps_per_epoch, microbatches, given)


def loaded(source: StepSource, mesh: Mesh, what: str, start: int = 0) -> Iterator[Item]:
    """The batches of steps `start ..` in order; waiting for one is named by `what` (see `watchdog.awaited`)."""
    for rows in awaited(batches(source, start), what):
        arrays, info = rows["arrays"], rows["info"]
        shape = info["shape"]
        yield Item(
            update=info["step"] + 1,
            batch=to_global(arrays, mesh, shape.rows // source.microbatches),
            shape=shape,
            facts={
                "pairs": info["pairs"], "tokens": info["tokens"], "useful_token_fraction": info["fraction"]
            },
            examples=info["placed"],
        )  # fmt: skip


def slots_of(shape: RowShape) -> Slots:
    """The static widths that a step is compiled for."""
    return Slots(*shape.widths)
