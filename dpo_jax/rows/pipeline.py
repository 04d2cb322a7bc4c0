"""Plan → NumPy rows: a grain dataset over the steps of a run, random access by step number.

Nothing here touches a device: grain's workers import this module in fresh processes.

Shapes: M microbatches, B rows of a microbatch, K pairs in a row, T tokens of a row, N completion tokens of a row.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from dpo_jax.data.mixture import Mixture, apportion
from dpo_jax.errors import UserError
from dpo_jax.rows.balance import EMPTY
from dpo_jax.rows.schedule import EpochPlan, Ladder, Order, RowLimits, RowShape, choose_ladder, plan_epoch


class PairSource(Protocol):
    """Tokenised pairs by index: `lengths` int `[n, 3]`, and (prompt, chosen, rejected) token ids of pair i."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class ChosenOnly:
    """The same pairs with an empty rejected completion: what SFT trains on."""

    pairs: PairSource

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.pairs.lengths) * np.array([1, 1, 0])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        prompt, chosen, _ = self.pairs[i]
        return prompt, chosen, np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Every step of a run, by number from 0: which epoch it lies in and where its pairs go.

    Attributes:
      pairs: where token ids come from; `lengths` are theirs, int `[n, 3]`.
      batch_size: pairs a step.
      ladder: the compiled shapes.
      order: in which order pairs come.
      mixture: which pairs make an epoch; None: all of them.
    """

    pairs: PairSource
    lengths: np.ndarray
    batch_size: int
    ladder: Ladder
    order: Order
    mixture: Mixture | None = None

    @property
    def shapes(self) -> tuple[RowShape, ...]:
        return self.ladder.shapes

    @property
    def epoch_size(self) -> int:
        """Pairs of an epoch, a short last batch that is dropped not counted."""
        if self.mixture is not None:
            return self.mixture.epoch_size(self.batch_size, self.order.drop_remainder)
        n = len(self.pairs)
        return n // self.batch_size * self.batch_size if self.order.drop_remainder else n

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch_size // self.batch_size)

    def place(self, step: int) -> tuple[RowShape, np.ndarray]:
        """The shape of a step, and the pair indices `[rows, pairs]` in it."""
        epoch, i = divmod(step, self.steps_per_epoch)
        plan = self.epoch(epoch)
        return plan.shapes[plan.shape[i]], plan.placed[i]

    def epoch(self, number: int) -> EpochPlan:
        """The placement of a whole epoch, number from 0."""
        return _epoch_plan(self, number)

    def members(self, epoch: int) -> np.ndarray:
        """The pairs from which an epoch is made, int64."""
        if self.mixture is None:
            return np.arange(len(self.pairs))
        return self.mixture.members(self.epoch_size, self.order.seed, epoch, self.order.shuffle)


@functools.lru_cache(maxsize=4)
def _epoch_plan(schedule: Schedule, epoch: int) -> EpochPlan:
    members = schedule.members(epoch)
    plan = plan_epoch(schedule.lengths[members], schedule.batch_size, schedule.ladder, schedule.order, epoch)
    named = np.append(members, EMPTY)  # EMPTY is -1: the last
    return dataclasses.replace(plan, placed=[named[rows] for rows in plan.placed])


def make_schedule(
    pairs: PairSource, batch_size: int, limits: RowLimits, order: Order, mixture: Mixture | None = None
) -> Schedule:
    """Choose row shapes for these pairs and plan them.

    Raises:
      UserError: a part of the mixture has too few pairs for one batch of the proportions asked for.
    """
    lengths = np.asarray(pairs.lengths)
    draft = Schedule(pairs, lengths, batch_size, Ladder((), ()), order, mixture)
    if mixture is not None and not draft.epoch_size:
        raise UserError(
            f"batch_size={batch_size}: the mixture's proportions leave less than one batch (pairs of its parts: "
            f"{', '.join(map(str, mixture.sizes))}); lower batch_size or change the weights"
        )
    if mixture is not None and not (apportion(draft.epoch_size, mixture.weights) > 0).all():
        raise UserError(
            f"a mixture of weights {', '.join(f'{w:g}' for w in mixture.weights)} over pairs "
            f"{', '.join(map(str, mixture.sizes))} gives nothing of one part to an epoch of {draft.epoch_size}; "
            "bring the weights nearer together, or leave the part out"
        )
    epoch = lengths[draft.members(0)]
    ladder = choose_ladder(epoch, batch_size, limits, order, longest=lengths.max(0))
    return dataclasses.replace(draft, ladder=ladder)


def build_rows(pairs: PairSource, placed: np.ndarray, shape: RowShape) -> dict[str, np.ndarray]:
    """Lay pairs into rows.

    Args:
      pairs: where the token ids come from.
      placed: int `[B, K]` pair indices; -1 is an empty place.
      shape: the slots' widths.

    Returns:
      `tokens`, `segments`, `positions` int32 `[B, T]`; `source` int32 `[B, N]`: the row index of the token whose hidden
      state predicts completion token n; `is_pair` bool `[B, K]`; `completion_tokens` int32 `[B, K, 2]`.
    """
    B, K = placed.shape
    T, N = sum(shape.widths), shape.chosen + shape.rejected
    starts = (0, shape.prompt, shape.prompt + shape.chosen)
    out = {
        "tokens": np.zeros((B, T), np.int32),
        "segments": np.zeros((B, T), np.int32),
        "positions": np.zeros((B, T), np.int32),
        "source": np.zeros((B, N), np.int32),
        "is_pair": placed >= 0,
        "completion_tokens": np.zeros((B, K, 2), np.int32),
    }
    for b in range(B):
        used = list(starts)
        for k in np.flatnonzero(placed[b] >= 0):
            parts = pairs[int(placed[b, k])]
            prompt_end = used[0] + len(parts[0])
            for slot, ids in enumerate(parts):
                a, z = used[slot], used[slot] + len(ids)
                used[slot] = z
                if z > starts[slot] + shape.widths[slot]:
                    raise AssertionError(f"pair {placed[b, k]} overflows slot {slot} of {shape}")
                first = 0 if slot == 0 else len(parts[0])
                out["tokens"][b, a:z] = ids
                out["segments"][b, a:z] = k + 1
                out["positions"][b, a:z] = np.arange(first, first + len(ids))
                if slot > 0 and z > a:
                    n = a - shape.prompt
                    out["source"][b, n : n + z - a] = np.arange(a - 1, z - 1)
                    out["source"][b, n] = prompt_end - 1
                    out["completion_tokens"][b, k, slot - 1] = len(ids)
    return out


@dataclasses.dataclass(frozen=True)
class StepSource:
    """Random access to the rows of a step: what grain reads.

    Attributes:
      schedule: the plan.
      microbatches: M; rows are dealt to microbatches in order.
      rows_of: for a microbatch of so many rows, which of them this process loads.
      steps: how many steps there are.
      given: more of every pair, `[pairs, ...]` by name; rows then have it as `[M, B, K, ...]`, 0 where no pair is.
    """

    schedule: Schedule
    microbatches: int
    rows_of: dict[int, np.ndarray]
    steps: int
    given: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> dict[str, Any]:
        """Rows `[M, B, ...]` of this process; under `info`, facts about the whole step (`placed` `[M, B, K]`)."""
        step = int(step)
        shape, placed = self.schedule.place(step)
        per_micro = placed.reshape(self.microbatches, -1, placed.shape[1])
        mine = per_micro[:, self.rows_of[shape.rows // self.microbatches]]
        flat = build_rows(self.schedule.pairs, mine.reshape(-1, placed.shape[1]), shape)
        arrays = {name: x.reshape(*mine.shape[:2], *x.shape[1:]) for name, x in flat.items()}
        for name, values in self.given.items():
            held = mine[(...,) + (None,) * (values.ndim - 1)] >= 0
            arrays[name] = np.where(held, values[np.maximum(mine, 0)], 0)
        ids = placed[placed >= 0]
        real = int(self.schedule.lengths[ids].sum())
        info = {"step": step, "shape": shape, "pairs": len(ids), "tokens": real, "fraction": real / shape.tokens}
        info["placed"] = per_micro
        return {"arrays": arrays, "info": info}


def batches(source: StepSource, start: int, *, threads: int = 2, prefetch: int = 4) -> Iterator[dict[str, Any]]:
    """Steps `start ..` in order, read ahead in threads."""
    dataset = grain.MapDataset.source(source)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))
