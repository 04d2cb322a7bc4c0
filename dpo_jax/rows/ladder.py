"""The few row shapes of a run, chosen from the lengths of its groups.

Shapes are a matter of luck for a random batch: the sums of its prompts and of its completions scatter by 10% and more,
and each has to fit its slot. The first shapes are what a sample of the run's batches needs once it is balanced; the
last one always fits. Where the order is shuffled, the batches never depend on the hardware: they are balanced in rows
that follow from lengths and batch size alone (`Ladder.home`).
"""

import dataclasses
import math

import numpy as np

from dpo_jax.rows import balance
from dpo_jax.rows.balance import Placing, across_batches, needed, within_batches
from dpo_jax.rows.shape import Order, RowLimits, RowShape
from dpo_jax.rows.slots import by_length, slot_widths

# Fill aimed at for the tightest shape: rows this much wider than the mean content of a row.
SLACK = 0.015
# How much wider than anything the sample needed a shuffled run's third shape is: other epochs have other luck.
ROOM = 0.08
ROOM_FOR_OTHERS = 0.25  # the same in file order, where nothing is exchanged between batches
SAMPLE_GROUPS = 16_384
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
class Ladder:
    """The shapes of a run.

    Attributes:
      shapes: compiled ones, cheapest first; the last has one group a row and the longest widths there are.
      home: the shapes in which shuffled batches are balanced, whatever the hardware; empty in file order.
    """

    shapes: tuple[RowShape, ...]
    home: tuple[RowShape, ...]


def choose_ladder(
    lengths: np.ndarray,
    batch_size: int,
    limits: RowLimits,
    order: Order,
    *,
    longest: np.ndarray | None = None,
    others: bool = False,
) -> Ladder:
    """Choose at most four row shapes from the lengths: three for what balancing reaches, and one that always fits.

    Args:
      lengths: int `[N, 1+n]` tokens of prompt and completions of every group of an epoch.
      batch_size: groups a step.
      longest: int `[1+n]`, of all groups (`slots.by_length`), where other epochs have others.
      others: in file order, whether the batches will be others than these, which stand for them.
    """
    lengths = by_length(np.asarray(lengths, np.int64))
    longest = lengths.max(0) if longest is None else np.asarray(longest, np.int64)
    alone = -(-batch_size // limits.row_multiple) * limits.row_multiple  # rows of one group each
    sure = _shape(alone, _round_up(longest, limits.width_multiple), 1)
    size = max(batch_size, SAMPLE_GROUPS)
    if not order.shuffle:
        ids = balance.consecutive(np.arange(len(lengths)), batch_size, order.drop_remainder)
        plain = np.zeros(len(ids), bool)
        few = slice(0, max(1, size // batch_size))
        place = within_batches(ids[few], plain[few], lengths, order, 0)
        shapes = _choose((lengths, lengths[:size]), batch_size, limits, longest, 0.0, place)
        # What the schedule will do is known: the widest shape is made to hold all of it.
        placed, _ = within_batches(ids, plain, lengths, order, 0)(shapes[0], longest)
        last = shapes[-1]
        need = np.maximum(_round_up(needed(placed, lengths, last.widths).max(0), limits.width_multiple), last.widths)
        shapes = [*shapes[:-1], _shape(last.rows, need, last.places)]
        if others:  # a batch that is a little larger than all of these would have one group a row
            room = _round_up(np.minimum(need * (1 + ROOM_FOR_OTHERS), longest * last.places), limits.width_multiple)
            shapes = [shapes[0], shapes[-1], _shape(last.rows, room, last.places)]
        return Ladder(tuple(dict.fromkeys((*shapes, sure))), ())
    sample = lengths[np.random.default_rng([order.seed, 1]).permutation(len(lengths))[:size]]
    # Nothing of this machine: rows divide by a power of two for about eight groups a row, and few devices need others.
    neutral = RowLimits(2 ** int(math.log2(min(8, max(1, batch_size // 8)))), key_cost=NEUTRAL_KEY_COST)
    home = _choose((lengths, sample), batch_size, neutral, longest, ROOM, across_batches(sample, batch_size, order, 0))
    if home[0].rows % limits.row_multiple == 0:
        shapes = [_shape(s.rows, _round_up(np.array(s.widths), limits.width_multiple), s.places) for s in home]
    else:
        placed, marked = across_batches(sample, batch_size, order, 0)(home[0], widest(tuple(home)))
        again = within_batches(balance.members(placed, batch_size), marked, sample, order, 0)
        shapes = _choose((lengths, sample), batch_size, limits, longest, ROOM, again)
    return Ladder(tuple(dict.fromkeys((*shapes, sure))), tuple(home))


def _choose(
    known: tuple[np.ndarray, np.ndarray],
    batch_size: int,
    limits: RowLimits,
    longest: np.ndarray,
    room: float,
    place: Placing,
) -> list[RowShape]:
    """The cheapest number of rows, and nested shapes for what `place` makes of a sample in them.

    `known` are the lengths of all groups and of the sample.
    """
    lengths, sample = known
    longest = _round_up(longest, limits.width_multiple)
    narrowest = np.quantile(lengths, 1 - LONG_SHARE, axis=0) if room else longest
    judged: list[tuple[float, float, list[RowShape]]] = []
    for rows in _row_candidates(batch_size, limits.row_multiple):
        mean = lengths.mean(0) * min(batch_size, len(lengths)) / rows * (1 + SLACK)
        groups = min(batch_size, len(lengths)) / rows
        target = _round_up(slot_widths(mean, narrowest, groups, limits.width_multiple), limits.width_multiple)
        cheapest = min((cost for cost, *_ in judged), default=math.inf)
        if _cost(rows, target, limits.key_cost) < cheapest * FILL_WORTH:
            shape = _shape(rows, target, _places(batch_size, rows))
            wide = slot_widths(mean, longest, groups, 1)
            placed, marked = place(shape, wide)
            need = needed(placed, sample, shape.widths)
            need[marked] = needed(placed[marked], sample, wide)
            judged.append(_judge(placed, need, marked, sample, shape, limits, room))
    cheapest = min(cost for cost, *_ in judged)
    filled = [j for j in judged if j[1] >= FILL and j[0] <= cheapest * FILL_WORTH]
    return min(filled or judged, key=lambda j: j[0])[2]


def _judge(
    placed: np.ndarray,
    need: np.ndarray,
    marked: np.ndarray,
    sample: np.ndarray,
    shape: RowShape,
    limits: RowLimits,
    room: float,
) -> tuple[float, float, list[RowShape]]:
    """How a sample does in rows of `shape`: mean cost of a step, fraction of real tokens, and the shapes it needs."""
    widths, counts = _rungs(need, marked, room)
    target = np.asarray(shape.widths)
    widths = [_round_up(np.maximum(x, target if room else 0), limits.width_multiple) for x in widths]
    widths[-1] = _round_up(np.maximum(widths[-1], sample.max(0)), limits.width_multiple)
    cost = sum(_cost(shape.rows, x, limits.key_cost) * n for x, n in zip(widths, counts, strict=True)) / len(placed)
    computed = sum(shape.rows * int(x.sum()) * n for x, n in zip(widths, counts, strict=True))
    fill = int(sample[placed[placed >= 0]].sum()) / max(1, computed)
    return cost, fill, list(dict.fromkeys(_shape(shape.rows, x, shape.places) for x in widths))


def _rungs(need: np.ndarray, marked: np.ndarray, room: float) -> tuple[list[np.ndarray], list[int]]:
    """Nested widths for what batches need `[n, 1+n]`, at most three, and how many batches each serves.

    Args:
      marked: bool `[n]`, batches of long groups: they have the widest shape.
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
    """Numbers of rows to try: multiples of `multiple`, geometrically spaced up to one group a row."""
    most = -(-batch_size // multiple)
    tried = {*range(1, min(most, 8) + 1), *(min(most, round(8 * 1.3**i)) for i in range(20))}
    return [multiple * m for m in sorted(tried)]


def _places(batch_size: int, rows: int) -> int:
    """Places for groups in a row: some stay empty, so that a row with a long group can hold fewer."""
    mean = -(-batch_size // rows)
    return min(batch_size, mean + max(1, mean // 2)) if rows > 1 else mean


def widest(shapes: tuple[RowShape, ...]) -> np.ndarray:
    """The widest widths `[1+n]` of the shapes that have the first one's rows."""
    first = shapes[0]
    return np.max([s.widths for s in shapes if (s.rows, s.places) == (first.rows, first.places)], axis=0)


def _shape(rows: int, widths: np.ndarray, places: int) -> RowShape:
    prompt, *completions = (int(x) for x in widths)
    return RowShape(prompt, tuple(completions), rows, places)


def _round_up(x: np.ndarray, multiple: int) -> np.ndarray:
    return (np.ceil(np.asarray(x, np.float64) / multiple - 1e-9) * multiple).astype(np.int64)


def _cost(rows: int, widths: np.ndarray, key_cost: float) -> float:
    """Work of a step, in tokens: linear layers, and attention by the number of keys a token can see."""
    prompt, *completions = (float(w) for w in widths)
    keys = prompt * prompt / 2 + sum(completions) * prompt + sum(w * w for w in completions) / 2
    return rows * (sum((prompt, *completions)) + key_cost * keys)
