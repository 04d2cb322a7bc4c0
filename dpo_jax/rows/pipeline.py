"""Schedule → NumPy rows: a grain dataset over the steps of a run, random access by step number.

Nothing here touches a device: grain's workers import this module in fresh processes.

Shapes: M microbatches, B rows of a microbatch, K groups in a row.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dpo_jax.rows.batch import Batch
from dpo_jax.rows.build import build_rows, token_rows
from dpo_jax.rows.schedule import Schedule
from dpo_jax.rows.shape import RowShape


@dataclasses.dataclass(frozen=True)
class Step:
    """The rows of one step.

    Attributes:
      number: from 0.
      shape: of its rows.
      batch: the rows of this process, `[M, B, ...]`.
      placed: int `[M, B, K]`, the groups of the whole step; -1 where there is none.
      tokens: real ones of the whole step.
    """

    number: int
    shape: RowShape
    batch: Batch[np.ndarray]
    placed: np.ndarray
    tokens: int

    @property
    def groups(self) -> int:
        """How many groups the whole step has."""
        return int((self.placed >= 0).sum())


@dataclasses.dataclass(frozen=True)
class StepSource:
    """Random access to the rows of a step: what grain reads.

    Attributes:
      schedule: where groups go.
      microbatches: M; rows are dealt to microbatches in order.
      rows_of: for a microbatch of so many rows, which of them this process loads.
      steps: how many steps there are.
      given: more of every group, `[groups, ...]` by its name in `Batch`; 0 where a row has no group.
      drawn_logps: of the completions that a sampler drew: a value for each token of each completion of each group; the
        batch has them then, and `owner`.
    """

    schedule: Schedule
    microbatches: int
    rows_of: dict[int, np.ndarray]
    steps: int
    given: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    drawn_logps: Sequence[Sequence[np.ndarray]] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> Step:
        shape, placed = self.schedule.place(int(step))
        per_micro = placed.reshape(self.microbatches, -1, placed.shape[1])
        mine = per_micro[:, self.rows_of[shape.rows // self.microbatches]]
        of_rows = mine.reshape(-1, placed.shape[1])
        flat = build_rows(self.schedule.groups, of_rows, shape)
        if self.drawn_logps is not None:
            drawn, owner = token_rows(self.drawn_logps, of_rows, flat, shape)
            flat = flat._replace(drawn_logps=drawn, owner=owner)
        batch = flat.map(lambda x: x.reshape(*mine.shape[:2], *x.shape[1:]))
        given = {}
        for name, values in self.given.items():
            held = mine[(...,) + (None,) * (values.ndim - 1)] >= 0
            given[name] = np.where(held, values[np.maximum(mine, 0)], 0)
        real = int(self.schedule.lengths[placed[placed >= 0]].sum())
        return Step(int(step), shape, batch._replace(**given), per_micro, real)


def batches(source: StepSource, start: int, *, threads: int = 2, prefetch: int = 4) -> Iterator[Step]:
    """Steps `start ..` in order, read ahead in threads."""
    dataset = grain.MapDataset.source(source)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))
