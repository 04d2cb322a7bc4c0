"""The schedule: which group goes in which row of which step.

It is a pure function of (lengths, batch size, order, epoch, row limits), with no hidden state. Resuming is a step
number, and every process can know the whole schedule while it loads only its own rows.

Every step has exactly `batch_size` groups (a short last batch has fewer, the rest is empty), placed in rows of one of
at most four compiled shapes (`ladder.py`). Where the order is shuffled anyway, groups are exchanged between the rows of
different batches until the rows are evenly filled; the batches stay random samples of the epoch, only more alike in
length than chance would make them. In file order (`shuffle=False`), groups move between the rows of their own batch
only, and a batch holds exactly the groups that the file gives it.

Which groups a batch has never depends on the hardware: batches are balanced in rows that follow from lengths and batch
size alone (`Ladder.home`). Where those do not divide over the data shards, every batch is placed anew in rows that do.
So a run may be resumed with other devices or processes, and two runs can be compared step by step.
"""

import dataclasses
import functools

import numpy as np

from dpo_jax.data.mixture import Mixture, apportion
from dpo_jax.errors import UserError
from dpo_jax.rows import balance
from dpo_jax.rows.balance import EMPTY, across_batches, needed, within_batches
from dpo_jax.rows.build import GroupSource
from dpo_jax.rows.ladder import Ladder, choose_ladder, widest
from dpo_jax.rows.shape import Order, RowLimits, RowShape
from dpo_jax.rows.slots import by_length


@dataclasses.dataclass(frozen=True)
class EpochSchedule:
    """The placement of one epoch.

    Attributes:
      shapes: the ladder's; `shape[i]` is the index in it of step i.
      shape: int8 `[steps]`.
      placed: per step int64 `[rows, places]`: indices of groups, `EMPTY` where there is none.
    """

    shapes: tuple[RowShape, ...]
    shape: np.ndarray
    placed: list[np.ndarray]


def schedule_epoch(lengths: np.ndarray, batch_size: int, ladder: Ladder, order: Order, epoch: int = 0) -> EpochSchedule:
    """Place every group of one epoch (number from 0): none occurs twice, and only the remainder is missing.

    Args:
      lengths: int `[N, 1+n]` tokens of prompt and completions of every group of the epoch.
      batch_size: groups a step, exactly.
      ladder: from `choose_ladder` for these lengths.
    """
    lengths = by_length(np.asarray(lengths, np.int64))
    first = ladder.shapes[0]
    assert lengths.shape[1] == len(first.widths), f"lengths {lengths.shape} for rows of {first.n} completions"
    wide = widest(ladder.shapes)
    if not ladder.home:
        ids = balance.consecutive(np.arange(len(lengths)), batch_size, order.drop_remainder)
        placed, _ = within_batches(ids, np.zeros(len(ids), bool), lengths, order, 0)(first, wide)
    else:
        home, room = ladder.home[0], widest(ladder.home)
        placed, marked = across_batches(lengths, batch_size, order, epoch)(home, room)
        bad = np.flatnonzero((needed(placed, lengths, room) > room).any(1))
        if len(bad):  # unlucky steps: exchange once more, with some others and all the room there is
            rng = np.random.default_rng([order.seed, epoch, 2])
            part = np.union1d(bad, rng.permutation(len(placed))[: 8 * len(bad)])
            placed[part] = balance.balance(placed[part], lengths, room, rng, across=True)
        if (home.rows, home.places) != (first.rows, first.places):
            again = within_batches(balance.members(placed, batch_size), marked, lengths, order, epoch)
            placed, _ = again(first, wide)
    index = np.full(len(placed), len(ladder.shapes) - 1, np.int8)
    for i, shape in reversed(list(enumerate(ladder.shapes))):
        if (shape.rows, shape.places) == (first.rows, first.places):
            need = needed(placed, lengths, shape.widths)
            index[(need <= np.asarray(shape.widths)).all(1)] = i
    steps = [_final(rows, ladder.shapes[rung]) for rung, rows in zip(index, placed, strict=True)]
    return EpochSchedule(ladder.shapes, index, steps)


def efficiency(schedule: EpochSchedule, lengths: np.ndarray) -> float:
    """Fraction of the epoch's computed tokens that are real."""
    computed = sum(schedule.shapes[i].tokens for i in schedule.shape)
    real = sum(int(lengths[rows[rows >= 0]].sum()) for rows in schedule.placed)
    return real / max(1, computed)


def _final(rows: np.ndarray, shape: RowShape) -> np.ndarray:
    """Empty places last in each row; one group a row where only the shape that always fits does."""
    if rows.shape == (shape.rows, shape.places):
        return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)
    alone = np.full((shape.rows, 1), EMPTY, np.int64)
    held = np.sort(rows[rows >= 0])
    alone[: len(held), 0] = held
    return alone


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Every step of a run, by number from 0: which epoch it is in and where its groups go.

    Attributes:
      groups: where token ids come from; `lengths` are theirs, int `[N, 1+n]`.
      batch_size: groups a step.
      ladder: the compiled shapes.
      order: in which order groups come.
      mixture: which groups make an epoch; None: all of them.
    """

    groups: GroupSource
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
        """Groups of an epoch, a short last batch that is dropped not counted."""
        if self.mixture is not None:
            return self.mixture.epoch_size(self.batch_size, self.order.drop_remainder)
        n = len(self.groups)
        return n // self.batch_size * self.batch_size if self.order.drop_remainder else n

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch_size // self.batch_size)

    def place(self, step: int) -> tuple[RowShape, np.ndarray]:
        """The shape of a step, and the group indices `[rows, places]` in it."""
        epoch, i = divmod(step, self.steps_per_epoch)
        schedule = self.epoch(epoch)
        return schedule.shapes[schedule.shape[i]], schedule.placed[i]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (a run has two schedules, until it ends)
    def epoch(self, number: int) -> EpochSchedule:
        """The placement of a whole epoch, number from 0."""
        members = self.members(number)
        of_members = schedule_epoch(self.lengths[members], self.batch_size, self.ladder, self.order, number)
        named = np.append(members, EMPTY)  # EMPTY is -1: the last
        return dataclasses.replace(of_members, placed=[named[rows] for rows in of_members.placed])

    def members(self, epoch: int) -> np.ndarray:
        """The groups from which an epoch is made, int64."""
        if self.mixture is None:
            return np.arange(len(self.groups))
        return self.mixture.members(self.epoch_size, self.order.seed, epoch, self.order.shuffle)


def make_schedule(
    groups: GroupSource,
    batch_size: int,
    limits: RowLimits,
    order: Order,
    mixture: Mixture | None = None,
    longest: np.ndarray | None = None,
    like: np.ndarray | None = None,
) -> Schedule:
    """Choose row shapes for these groups.

    Args:
      longest: int `[1+n]`, tokens of prompt and completions that a row must have room for, where there will be others.
      like: int `[N, 1+n]`, lengths of many batches that stand for all that will come, where these groups are too few to
        tell.

    Raises:
      UserError: a part of the mixture has too few pairs for one batch of the proportions asked for.
    """
    lengths = np.asarray(groups.lengths)
    draft = Schedule(groups, lengths, batch_size, Ladder((), ()), order, mixture)
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
    epoch = lengths[draft.members(0)] if like is None else like
    widest_groups = by_length(lengths).max(0) if longest is None else np.maximum(by_length(lengths).max(0), longest)
    ladder = choose_ladder(epoch, batch_size, limits, order, longest=widest_groups, others=like is not None)
    return dataclasses.replace(draft, ladder=ladder)


WORTH = 1.15  # so many times more tokens to compute, and other groups get rows of their own
WORTH_OF_ONE = 1.5  # the same where a step is compiled for one batch, and its answers may be longer by chance


def fitted(
    groups: GroupSource,
    batch_size: int,
    limits: RowLimits,
    order: Order,
    *,
    longest: np.ndarray,
    before: Ladder | None,
    like: np.ndarray | None = None,
) -> Schedule:
    """The schedule of groups that come after others.

    Rows keep the shapes that steps are compiled for, unless the new groups would waste them.

    Args:
      before: the shapes of those others; None: there were none.
      longest, like: as in `make_schedule`, of all that will come.
    """
    filled = lambda one: efficiency(one.epoch(0), one.lengths)
    chosen = functools.partial(make_schedule, groups, batch_size, limits, order, longest=longest, like=like)
    if before is None:
        return chosen()
    kept = Schedule(groups, np.asarray(groups.lengths), batch_size, before, order)
    worth = WORTH if like is None else WORTH_OF_ONE
    if worth * filled(kept) > 1:  # rows that are full are not so much better: choosing some takes longer than this
        return kept
    schedule = chosen()
    if like is None:
        now, then = filled(kept), filled(schedule)
    else:  # the fill of one batch is a matter of luck
        now, then = (efficiency(schedule_epoch(like, batch_size, x, order), like) for x in (before, schedule.ladder))
    return kept if then < worth * now else schedule
