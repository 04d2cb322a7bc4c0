"""A schedule's steps as a jitted step takes them: read ahead, built into rows, placed on the mesh."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.model.placement import Layout
from dpo_jax.parallel.mesh import local_rows, to_global
from dpo_jax.parallel.watchdog import LONGER, awaited, beat
from dpo_jax.rows.build import GroupSource
from dpo_jax.rows.pipeline import Step, StepSource, batches
from dpo_jax.rows.schedule import Schedule, make_schedule
from dpo_jax.rows.shape import Order

Given = Mapping[str, np.ndarray]  # more of every group, by its name in `Batch`


@dataclasses.dataclass(frozen=True)
class Item:
    """The batch of one update, on the devices, and what its record tells of it.

    Attributes:
      update: its number, from 1.
      batch: what the step takes, a tree of arrays.
      shape: static; the step is compiled once for each.
      facts: numbers for the record; `pairs` among them are counted by the second.
      examples: numbers of the examples in it, -1 where there is none; events name them.
    """

    update: int
    batch: Any
    shape: Hashable
    facts: Mapping[str, float]
    examples: np.ndarray


def step_source(
    schedule: Schedule,
    mesh: Mesh,
    steps: int,
    microbatches: int,
    given: Given | None = None,
    drawn_logps: Sequence[Sequence[np.ndarray]] | None = None,
) -> StepSource:
    """The rows of the first `steps` steps that this process loads; `given` and `drawn_logps` as in `StepSource`."""
    per_micro = {shape.rows // microbatches for shape in schedule.shapes}
    return StepSource(
        schedule, microbatches, {n: local_rows(mesh, n) for n in per_micro}, steps, given or {}, drawn_logps
    )


def once_through(
    groups: GroupSource, batch_size: int, microbatches: int, layout: Layout, given: Given | None = None
) -> StepSource:
    """Every one of `groups` once."""
    limits, order = layout.row_limits(microbatches), Order(drop_remainder=False)
    schedule = make_schedule(groups, min(batch_size, len(groups)), limits, order)
    return step_source(schedule, layout.mesh, schedule.steps_per_epoch, microbatches, given)


def loaded(source: StepSource, mesh: Mesh, what: str, start: int = 0) -> Iterator[Item]:
    """The batches of steps `start ..` in order; waiting for one is named by `what` (see `watchdog.awaited`)."""
    for step in awaited(batches(source, start), what):
        yield on_mesh(step, source.microbatches, mesh)


def on_mesh(step: Step, microbatches: int, mesh: Mesh) -> Item:
    """The rows of a step, placed on the mesh."""
    return Item(
        update=step.number + 1,
        batch=to_global(step.batch, mesh, step.shape.rows // microbatches),
        shape=step.shape,
        facts={"pairs": step.groups, "tokens": step.tokens, "useful_token_fraction": step.tokens / step.shape.tokens},
        examples=step.placed,
    )


def passed(
    step: Callable[[Any, Any], Any], source: StepSource, mesh: Mesh, what: str
) -> Iterator[tuple[np.ndarray, Any]]:
    """One pass of (batch, shape) → results over a source: each is fetched while the next one is computed.

    So no more than two batches wait on the devices.

    Yields:
      The examples of each batch, -1 where there is none, and its results as NumPy arrays.
    """
    pending: list[tuple[np.ndarray, Any]] = []
    compiled: set[Any] = set()
    for item in loaded(source, mesh, f"the rows of the {what}"):
        beat(f"computing the {what}", 1.0 if item.shape in compiled else LONGER)
        compiled.add(item.shape)
        pending.append((item.examples, step(item.batch, item.shape)))
        if len(pending) > 1:
            yield jax.device_get(pending.pop(0))
    yield from jax.device_get(pending)
