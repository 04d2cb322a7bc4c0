"""The plan: which pair goes in which row of which step.

A plan is a pure function of (lengths, batch size, order, epoch, row limits), with no hidden state. Resuming is a step
number, and every process can know the whole plan while it loads only its own rows.

Every step has exactly `batch_size` pairs (a short last batch has fewer, the rest is empty), placed in rows of one of at
most four compiled shapes. Shapes are a matter of luck for a random batch: the sums of its prompts, chosen and rejected
completions scatter by 10% and more, and each would have to fit its slot. So, where the order is shuffled anyway, pairs
are exchanged between the rows of different batches until the rows are evenly filled; the batches stay random samples
of the epoch, only more alike in length than chance would make them. In file order (`shuffle=False`), pairs move between
the rows of their own batch only, and a batch holds exactly the pairs that the file gives it.

Which pairs a batch has never depends on the hardware: batches are balanced in rows that follow from lengths and batch
size alone (`Ladder.home`). Where those do not divide over the data shards, every batch is laid anew into rows that do.
So a run may go on with other devices or processes, and two runs can be compared step by step.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from dpo_jax.rows import balance
from dpo_jax.rows.balance import EMPTY

# Fill aimed at for the tightest shape: rows this much wider than the mean content of a row.
SLACK = 0.015
# How much wider than anything the sample needed a shuffled run's third shape is: other epochs have other luck.
ROOM = 0.08
SAMPLE_PAIRS = 16_384
# Rows with this fraction of real tokens (0.95, and what a sample is wrong by) are taken before others, unless their
# attention makes them that much dearer.
FILL = 0.957
FILL_WORTH = 1.2
# A slot of the common shapes holds all but this share of the completions (or prompts). The few longer ones would make
# every row of a run that wide; in a shuffled run they meet in a few batches of a wider shape.
LONG_SHARE = 0.004
# The price of attention that the home shapes reckon with: between a large model's on TPU and a small one's on CPU.
NEUTRAL_KEY_COST = 4e-4


@dataclasses.dataclass(frozen=True)
class RowShape:
    """A compiled shape: `rows` of a whole step, slot widths in tokens, and how many pairs a row can hold."""

    rows: int
    prompt: int
    chosen: int
    rejected: int
    pairs: int

    @property
    def widths(self) -> tuple[int, int, int]:
        return (self.prompt, self.chosen, self.rejected)

    @property
    def tokens(self) -> int:
        """Computed tokens of a step, padding included."""
        return self.rows * sum(self.widths)


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What the hardware and the model ask of rows.

    Attributes:
      row_multiple: rows of a step divide by it (data shards x microbatches).
      width_multiple: slot widths divide by it (128 on TPU).
      key_cost: cost of letting one token look at one key, in units of the token's own matrix products.
    """

    row_multiple: int = 1
    width_multiple: int = 8
    key_cost: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order pairs come.

    Attributes:
      seed: the order and every exchange are a function of it and the epoch.
      shuffle: a new random order every epoch, and balanced batches; False keeps file order and the batches it gives.
      drop_remainder: leave out the last, short batch of an epoch.
    """

    seed: int = 0
    shuffle: bool = True
    drop_remainder: bool = True


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The shapes of a run.

    Attributes:
      shapes: compiled ones, cheapest first; the last has one pair a row and the longest widths there are.
      home: the shapes in which shuffled batches are balanced, whatever the hardware; empty in file order.
    """

    shapes: tuple[RowShape, ...]
    home: tuple[RowShape, ...]


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The placement of one epoch.

    Attributes:
      shapes: the ladder's; `shape[i]` is the index in it of step i.
      shape: int8 `[steps]`.
      placed: per step int64 `[rows, pairs]`: indices of pairs, `EMPTY` where there is none.
    """

    shapes: tuple[RowShape, ...]
    shape: np.ndarray
    placed: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.placed)


# (shape, widths of batches of long pairs) -> placement int64 [steps, rows, pairs], bool [steps]: is for long pairs
Lay = Callable[[RowShape, np.ndarray], tuple[np.ndarray, np.ndarray]]


def choose_ladder(
    lengths: np.ndarray, batch_size: int, limits: RowLimits, order: Order, *, longest: np.ndarray | None = None
) -> Ladder:
    """Choose at most four row shapes from the lengths: three for what balancing reaches, and one that always fits.

    Args:
      lengths: int `[n, 3]` tokens of prompt, chosen and rejected of every pair of an epoch.
      batch_size: pairs a step.
      limits: divisors of rows and widths, and the price of attention.
      order: as `plan_epoch` will have it.
      longest: int `[3]`, of all pairs, where other epochs have others.
    """
    lengths = np.asarray(lengths, np.int64)
    longest = lengths.max(0) if longest is None else np.asarray(longest, np.int64)
    sure = _shape(_ceil(batch_size, limits.row_multiple), _round_up(longest, limits.width_multiple), 1)
    size = max(batch_size, SAMPLE_PAIRS)
    if not order.shuffle:
        ids = balance.batches(np.arange(len(lengths)), batch_size, order.drop_remainder)
        plain = np.zeros(len(ids), bool)
        few = slice(0, max(1, size // batch_size))
        shapes = _choose(
            lengths, lengths[:size], batch_size, limits, longest, 0.0, _within(ids[few], plain[few], lengths, order, 0)
        )
        # What the plan will do is known: the widest shape is made to hold all of it.
        placed, _ = _within(ids, plain, lengths, order, 0)(shapes[0], longest)
        need = np.maximum(_round_up(balance.needed(placed, lengths).max(0), limits.width_multiple), shapes[-1].widths)
        shapes = [*shapes[:-1], _shape(shapes[-1].rows, need, shapes[-1].pairs)]
        return Ladder(tuple(dict.fromkeys((*shapes, sure))), ())
    sample = lengths[np.random.default_rng([order.seed, 1]).permutation(len(lengths))[:size]]
    neutral = RowLimits(_home_multiple(batch_size), key_cost=NEUTRAL_KEY_COST)  # nothing of this machine
    home = _choose(lengths, sample, batch_size, neutral, longest, ROOM, _across(sample, batch_size, order, 0))
    if home[0].rows % limits.row_multiple == 0:
        shapes = [_shape(s.rows, _round_up(np.array(s.widths), limits.width_multiple), s.pairs) for s in home]
    else:
        placed, marked = _across(sample, batch_size, order, 0)(home[0], np.max([s.widths for s in home], axis=0))
        again = _within(balance.members(placed, batch_size), marked, sample, order, 0)
        shapes = _choose(lengths, sample, batch_size, limits, longest, ROOM, again)
    return Ladder(tuple(dict.fromkeys((*shapes, sure))), tuple(home))


def plan_epoch(lengths: np.ndarray, batch_size: int, ladder: Ladder, order: Order, epoch: int = 0) -> EpochPlan:
    """Place every pair of one epoch.

    Args:
      lengths: int `[n, 3]` tokens of prompt, chosen and rejected of every pair of the epoch.
      batch_size: pairs a step, exactly.
      ladder: from `choose_ladder` for these lengths.
      order: in which order pairs come.
      epoch: number from 0.

    Returns:
      The placement; no pair occurs twice, and only the remainder is missing.
    """
    lengths = np.asarray(lengths, np.int64)
    first = ladder.shapes[0]
    wide = _widest(ladder.shapes)
    if not ladder.home:
        ids = balance.batches(np.arange(len(lengths)), batch_size, order.drop_remainder)
        placed, _ = _within(ids, np.zeros(len(ids), bool), lengths, order, 0)(first, wide)
    else:
        home, room = ladder.home[0], _widest(ladder.home)
        placed, marked = _across(lengths, batch_size, order, epoch)(home, room)
        bad = np.flatnonzero((balance.needed(placed, lengths) > room).any(1))
        if len(bad):  # unlucky steps: exchange once more, with some others and all the room there is
            rng = np.random.default_rng([order.seed, epoch, 2])
            part = np.union1d(bad, rng.permutation(len(placed))[: 8 * len(bad)])
            placed[part] = balance.balance(placed[part], lengths, room, rng, across=True)
        if (home.rows, home.pairs) != (first.rows, first.pairs):
            again = _within(balance.members(placed, batch_size), marked, lengths, order, epoch)
            placed, _ = again(first, wide)
    index = np.full(len(placed), len(ladder.shapes) - 1, np.int8)
    need = balance.needed(placed, lengths)
    for i, shape in reversed(list(enumerate(ladder.shapes))):
        if (shape.rows, shape.pairs) == (first.rows, first.pairs):
            index[(need <= np.asarray(shape.widths)).all(1)] = i
    steps = [_final(rows, ladder.shapes[rung]) for rung, rows in zip(index, placed, strict=True)]
    return EpochPlan(ladder.shapes, index, steps)


def efficiency(plan: EpochPlan, lengths: np.ndarray) -> float:
    """Fraction of computed tokens that are real, over the plan."""
    computed = sum(plan.shapes[i].tokens for i in plan.shape)
    real = sum(int(lengths[rows[rows >= 0]].sum()) for rows in plan.placed)
    return real / max(1, computed)


def _across(lengths: np.ndarray, batch_size: int, order: Order, epoch: int) -> Lay:
    """Shuffled batches, long pairs together, balanced between batches."""

    def lay(shape: RowShape, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([order.seed, epoch])
        widths = np.asarray(shape.widths, np.int64)
        ids, marked = balance.long_together(rng.permutation(len(lengths)), lengths, widths, batch_size, rng)
        batches = balance.batches(ids, batch_size, order.drop_remainder)
        marked = marked[: len(batches)]
        return _fitted(batches, marked, lengths, shape, wide, rng, across=True), marked

    return lay


def _within(batches: np.ndarray, marked: np.ndarray, lengths: np.ndarray, order: Order, epoch: int) -> Lay:
    """Batches `[n, batch_size]` that stay as they are: pairs move between the rows of their own batch."""

    def lay(shape: RowShape, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([order.seed, epoch, 3])
        return _fitted(batches, marked, lengths, shape, wide, rng, across=False), marked

    return lay


def _fitted(
    batches: np.ndarray,
    marked: np.ndarray,
    lengths: np.ndarray,
    shape: RowShape,
    wide: np.ndarray,
    rng: np.random.Generator,
    *,
    across: bool,
) -> np.ndarray:
    """Common batches aim at `shape`, those of long pairs at `wide` widths."""
    placed = np.empty((len(batches), shape.rows, shape.pairs), np.int64)
    for part, target in ((~marked, np.asarray(shape.widths, np.int64)), (marked, wide)):
        if part.any():
            placed[part] = balance.fit(batches[part], lengths, shape.rows, shape.pairs, target, rng, across=across)
    return placed


def _choose(
    lengths: np.ndarray,
    sample: np.ndarray,
    batch_size: int,
    limits: RowLimits,
    longest: np.ndarray,
    room: float,
    lay: Lay,
) -> list[RowShape]:
    """The cheapest number of rows, and nested shapes for what `lay` makes of a sample in them."""
    longest = _round_up(longest, limits.width_multiple)
    narrowest = np.quantile(lengths, 1 - LONG_SHARE, axis=0) if room else longest
    found: list[tuple[float, float, list[RowShape]]] = []
    for rows in _row_candidates(batch_size, limits.row_multiple):
        mean = lengths.mean(0) * min(batch_size, len(lengths)) / rows * (1 + SLACK)
        target = _round_up(np.maximum(mean, narrowest), limits.width_multiple)
        cheapest = min((cost for cost, *_ in found), default=math.inf)
        if _cost(rows, target, limits.key_cost) < cheapest * FILL_WORTH:
            shape = _shape(rows, target, _places(batch_size, rows))
            placed, marked = lay(shape, np.maximum(mean, longest))
            found.append(_judge(placed, marked, sample, shape, limits, room))
    cheapest = min(cost for cost, *_ in found)
    filled = [f for f in found if f[1] >= FILL and f[0] <= cheapest * FILL_WORTH]
    return min(filled or found, key=lambda f: f[0])[2]


def _judge(
    placed: np.ndarray, marked: np.ndarray, sample: np.ndarray, shape: RowShape, limits: RowLimits, room: float
) -> tuple[float, float, list[RowShape]]:
    """What a sample made of `shape`: mean cost of a step, fraction of real tokens, and the shapes it needs."""
    widths, counts = _rungs(balance.needed(placed, sample), marked, room)
    target = np.asarray(shape.widths)
    widths = [_round_up(np.maximum(x, target if room else 0), limits.width_multiple) for x in widths]
    widths[-1] = _round_up(np.maximum(widths[-1], sample.max(0)), limits.width_multiple)
    cost = sum(_cost(shape.rows, x, limits.key_cost) * n for x, n in zip(widths, counts, strict=True)) / len(placed)
    computed = sum(shape.rows * int(x.sum()) * n for x, n in zip(widths, counts, strict=True))
    fill = int(sample[placed[placed >= 0]].sum()) / max(1, computed)
    return cost, fill, list(dict.fromkeys(_shape(shape.rows, x, shape.pairs) for x in widths))


def _rungs(need: np.ndarray, marked: np.ndarray, room: float) -> tuple[list[np.ndarray], list[int]]:
    """Nested widths for what batches need `[n, 3]`, at most three, and how many batches each serves.

    Args:
      need: widths that each batch's fullest rows need.
      marked: bool `[n]`, batches of long pairs: they have the widest shape.
      room: how much wider than any need the widest is; 0 in file order, where every epoch is the same.
    """
    common = need[~marked]
    ranked = common[np.argsort((common / np.maximum(need.mean(0), 1)).max(1), kind="stable")]
    shares = (0.85, 1.0) if room else (0.6, 0.9, 1.0)
    edges = sorted({math.ceil(len(ranked) * q) for q in shares} - {0})
    widths = [ranked[:edge].max(0) for edge in edges]
    counts = np.diff([0, *edges]).tolist()
    if room:
        widths.append(need.max(0) * (1 + room))
        counts.append(int(marked.sum()))
    return widths, counts


def _row_candidates(batch_size: int, multiple: int) -> list[int]:
    """Numbers of rows to try: multiples of `multiple`, geometrically spaced up to one pair a row."""
    most = -(-batch_size // multiple)
    return [
        multiple * m for m in sorted({*range(1, min(most, 8) + 1), *(min(most, round(8 * 1.3**i)) for i in range(20))})
    ]


def _home_multiple(batch_size: int) -> int:
    """A power of two that rows divide by for their own sake: about eight pairs a row, and few devices need others."""
    return 2 ** int(math.log2(min(8, max(1, batch_size // 8))))


def _places(batch_size: int, rows: int) -> int:
    """Places for pairs in a row: some stay empty, so that a row with a long pair can hold fewer."""
    mean = -(-batch_size // rows)
    return min(batch_size, mean + max(1, mean // 2)) if rows > 1 else mean


def _widest(shapes: tuple[RowShape, ...]) -> np.ndarray:
    """The widest widths `[3]` of the shapes that have the first one's rows."""
    first = shapes[0]
    return np.max([s.widths for s in shapes if (s.rows, s.pairs) == (first.rows, first.pairs)], axis=0)


def _final(rows: np.ndarray, shape: RowShape) -> np.ndarray:
    """Empty places last in each row; one pair a row where only the shape that always fits does."""
    if rows.shape == (shape.rows, shape.pairs):
        return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)
    alone = np.full((shape.rows, 1), EMPTY, np.int64)
    held = np.sort(rows[rows >= 0])
    alone[: len(held), 0] = held
    return alone


def _shape(rows: int, widths: np.ndarray, pairs: int) -> RowShape:
    prompt, chosen, rejected = (int(x) for x in widths)
    return RowShape(rows, prompt, chosen, rejected, pairs)


def _ceil(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _round_up(x: np.ndarray, multiple: int) -> np.ndarray:
    return (np.ceil(np.asarray(x, np.float64) / multiple - 1e-9) * multiple).astype(np.int64)


def _cost(rows: int, widths: np.ndarray, key_cost: float) -> float:
    """Work of a step, in tokens: linear layers, and attention by the number of keys a token can see."""
    P, C, R = (float(w) for w in widths)
    keys = P * P / 2 + (C + R) * P + (C * C + R * R) / 2
    return rows * (P + C + R + key_cost * keys)
