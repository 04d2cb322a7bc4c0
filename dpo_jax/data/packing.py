"""The plan: which pair goes in which row of which step.

A plan is a pure function of (lengths, batch size, row limits, seed, epoch): no hidden state. Resuming is a step number,
and every process can know the whole plan while it loads only its own rows.

Every step has exactly `batch_size` pairs (a short last batch has fewer, the rest is empty), placed in rows of one of at
most four compiled shapes. Shapes are a matter of luck for a random batch: the sums of its prompts, chosen and rejected
completions scatter by 10% and more, and each would have to fit its slot. So, where the order is shuffled anyway, pairs
are exchanged between the rows of different batches until the rows are evenly filled; the batches stay random samples
of the epoch, only more alike in length than chance would make them. In file order (`shuffle=False`), pairs move between
the rows of their own batch only, and a batch holds exactly the pairs that the file gives it.
"""

import dataclasses
import math

import numpy as np

EMPTY = -1
# Fill aimed at for the tightest shape: rows this much wider than the mean content of a row.
SLACK = 0.02
# How much wider than anything the sample needed a shuffled run's third shape is: other epochs have other luck.
ROOM = 0.08
SAMPLE_PAIRS = 4096
ROUNDS = 80


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
    width_multiple: int = 16
    key_cost: float = 1e-3


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """The placement of one epoch.

    Attributes:
      shapes: the ladder; `shape[i]` is the index in it of step i.
      shape: int8 `[steps]`.
      placed: per step int64 `[rows, pairs]`: indices of pairs, `EMPTY` where there is none.
    """

    shapes: tuple[RowShape, ...]
    shape: np.ndarray
    placed: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.placed)


def _round_up(x: np.ndarray | float, multiple: int) -> np.ndarray:
    return (np.ceil(np.asarray(x, np.float64) / multiple - 1e-9) * multiple).astype(np.int64)


def _cost(rows: int, widths: np.ndarray, key_cost: float) -> float:
    """Work of a step, in tokens: linear layers, and attention by the number of keys a token can see."""
    P, C, R = (float(w) for w in widths)
    keys = P * P / 2 + (C + R) * P + (C * C + R * R) / 2
    return rows * (P + C + R + key_cost * keys)


def _deal(batches: np.ndarray, lengths: np.ndarray, rows: int, slots: int, target: np.ndarray) -> np.ndarray:
    """Lay batches `[n, batch_size]` (EMPTY allowed) into rows `[n, rows, slots]`: longest first onto the emptiest row."""
    n, size = batches.shape
    weights = (lengths / np.maximum(target, 1)).sum(-1)
    weight = np.where(batches >= 0, weights[batches], -1.0)
    by_size = np.take_along_axis(batches, np.argsort(-weight, axis=1, kind="stable"), axis=1)
    placed = np.full((n, rows, slots), EMPTY, np.int64)
    load = np.zeros((n, rows))
    for k in range(-(-size // rows)):
        dealt = by_size[:, k * rows : (k + 1) * rows]
        if dealt.shape[1] < rows:
            dealt = np.pad(dealt, ((0, 0), (0, rows - dealt.shape[1])), constant_values=EMPTY)
        emptiest = np.argsort(load, axis=1, kind="stable")
        np.put_along_axis(placed[:, :, k], emptiest, dealt, axis=1)
        added = np.where(dealt >= 0, weights[dealt], 0.0)
        np.put_along_axis(load, emptiest, np.take_along_axis(load, emptiest, axis=1) + added, axis=1)
    return placed


def _overflow(sums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Squared relative overflow of rows `[..., 3]` beyond their slots, summed over slots."""
    return (np.maximum(sums - target, 0.0) ** 2 / np.maximum(target, 1.0) ** 2).sum(-1)


def _exchange(a: np.ndarray, b: np.ndarray, same_batch: np.ndarray, lengths: np.ndarray, target: np.ndarray) -> None:
    """For row pairs `a[i], b[i]` (`[h, K]`, changed in place), make the one exchange that lowers overflow most.

    Exchanging a pair with an empty place moves it; that keeps batches exact only within one batch.
    """
    la, lb = lengths[a], lengths[b]  # [h, K, 3]; index -1 is the appended row of zeros
    sa, sb = la.sum(1), lb.sum(1)
    delta = lb[:, None, :, :] - la[:, :, None, :]  # [h, K, K, 3]
    before = _overflow(sa, target) + _overflow(sb, target)
    after = _overflow(sa[:, None, None] + delta, target) + _overflow(sb[:, None, None] - delta, target)
    legal = same_batch[:, None, None] | ((a < 0)[:, :, None] == (b < 0)[:, None, :])
    after = np.where(legal, after, np.inf).reshape(len(a), -1)
    best = np.argmin(after, axis=1)
    h = np.flatnonzero(after[np.arange(len(a)), best] < before - 1e-12)
    i, j = best[h] // a.shape[1], best[h] % a.shape[1]
    a[h, i], b[h, j] = b[h, j], a[h, i]


def _partners(rng: np.random.Generator, hot: np.ndarray, rows_per_batch: int, total: int, across: bool) -> np.ndarray:
    """A partner for every overfull row: any row, or one of its own batch."""
    if across:
        return rng.integers(0, total, len(hot))
    return hot // rows_per_batch * rows_per_batch + rng.integers(0, rows_per_batch, len(hot))


def _balance(
    placed: np.ndarray, lengths: np.ndarray, target: np.ndarray, rng: np.random.Generator, across: bool
) -> np.ndarray:
    """Exchange pairs between rows of `[n, rows, K]` until no slot overflows `target` or no luck is left."""
    n, rows, K = placed.shape
    flat = placed.reshape(n * rows, K).copy()
    lengths = np.concatenate([lengths, np.zeros((1, 3), lengths.dtype)]).astype(np.float32)
    target = target.astype(np.float32)
    chunk = max(1, 2_000_000 // (K * K))
    overflow = _overflow(lengths[flat].sum(1), target)
    for round_ in range(ROUNDS):
        hot = np.flatnonzero(overflow > 0)
        if len(hot) == 0:
            break
        # Moves inside a batch are the only ones that can change how many pairs a row has: take turns.
        other = _partners(rng, hot, rows, len(flat), across and round_ % 2 == 0)
        # A row may take part in one exchange at a time.
        both = np.stack([hot, other], 1)
        both = both[rng.permutation(len(both))]
        first = np.zeros(2 * len(both), bool)
        first[np.unique(both.reshape(-1), return_index=True)[1]] = True
        first = first.reshape(-1, 2).all(1)
        both = both[first & (both[:, 0] != both[:, 1])]
        for start in range(0, len(both), chunk):
            x, y = both[start : start + chunk].T
            a, b = flat[x], flat[y]
            _exchange(a, b, x // rows == y // rows, lengths, target)
            flat[x], flat[y] = a, b
            overflow[x], overflow[y] = _overflow(lengths[a].sum(1), target), _overflow(lengths[b].sum(1), target)
    return flat.reshape(n, rows, K)


def _batches(order: np.ndarray, batch_size: int, drop_remainder: bool) -> np.ndarray:
    """Consecutive batches `[n, batch_size]` of an order; the last one padded with EMPTY or dropped."""
    n = len(order) // batch_size if drop_remainder else -(-len(order) // batch_size)
    padded = np.full(n * batch_size, EMPTY, np.int64)
    padded[: min(len(order), len(padded))] = order[: len(padded)]
    return padded.reshape(n, batch_size)


def _places(batch_size: int, rows: int) -> int:
    """Places for pairs in a row: some stay empty, so that a row with a long pair can hold fewer."""
    mean = -(-batch_size // rows)
    return min(batch_size, mean + max(1, mean // 2)) if rows > 1 else mean


def _needed(placed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Widths `[n, 3]` that each batch's fullest rows need."""
    padded = np.concatenate([lengths, np.zeros((1, 3), lengths.dtype)])
    return padded[placed].sum(2).max(1)


def _order(n: int, *, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0]).permutation(n) if shuffle else np.arange(n)


def choose_ladder(
    lengths: np.ndarray,
    batch_size: int,
    limits: RowLimits,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_remainder: bool = True,
) -> tuple[RowShape, ...]:
    """Choose at most four row shapes from the lengths: three for what balancing reaches, and one that always fits.

    Args:
      lengths: int `[n, 3]` tokens of prompt, chosen and rejected of every pair.
      batch_size: pairs a step.
      limits: divisors of rows and widths, and the price of attention.
      seed, shuffle, drop_remainder: as in `plan_epoch`.

    Returns:
      The ladder, cheapest first. The last shape has one pair a row and the longest widths there are.
    """
    lengths = np.asarray(lengths, np.int64)
    w = limits.width_multiple
    longest = _round_up(lengths.max(0), w)
    order = _order(len(lengths), shuffle=shuffle, seed=seed, epoch=0)
    batches = _batches(order[: max(batch_size, SAMPLE_PAIRS)] if shuffle else order, batch_size, drop_remainder)
    pairs = min(batch_size, len(lengths))
    best: tuple[float, tuple[RowShape, ...]] | None = None
    for rows in _row_candidates(batch_size, limits.row_multiple):
        target = np.maximum(_round_up(lengths.mean(0) * pairs / rows * (1 + SLACK), w), longest)
        if best is not None and _cost(rows, target, limits.key_cost) >= best[0]:
            continue  # even perfectly filled it would not be cheaper
        placed = _deal(batches, lengths, rows, _places(batch_size, rows), target)
        placed = _balance(placed, lengths, target, np.random.default_rng([seed, 0, rows]), across=shuffle)
        need = np.maximum(_round_up(_needed(placed, lengths), w), longest)
        need = np.maximum(need, target) if shuffle else need
        # Nested shapes: batches sorted by their tightest slot, in three groups, each as wide as its widest member.
        scale = (need / np.maximum(target, 1)).max(1)
        ranked = need[np.argsort(scale, kind="stable")]
        cuts = sorted({max(1, math.ceil(len(ranked) * q)) for q in ((0.8, 1.0) if shuffle else (0.6, 0.9, 1.0))})
        widths = [ranked[:cut].max(0) for cut in cuts]
        costs = [_cost(rows, x, limits.key_cost) for x in widths]
        total = sum(c * (b - a) for c, a, b in zip(costs, [0, *cuts], cuts, strict=False)) / len(ranked)
        if shuffle:
            widths.append(_round_up(widths[-1] * (1 + ROOM), w))
        if best is None or total < best[0]:
            places = _places(batch_size, rows)
            shapes = [RowShape(rows, *(int(v) for v in x), places) for x in widths]
            best = total, tuple(dict.fromkeys(shapes))
    assert best is not None
    sure_rows = int(_round_up(batch_size, limits.row_multiple))
    sure = RowShape(sure_rows, *(int(v) for v in longest), 1)
    return tuple(dict.fromkeys((*best[1], sure)))


def _row_candidates(batch_size: int, multiple: int) -> list[int]:
    """Numbers of rows to try: multiples of `multiple`, geometrically spaced up to one pair a row."""
    most = -(-batch_size // multiple)
    return [
        multiple * m for m in sorted({*range(1, min(most, 8) + 1), *(min(most, round(8 * 1.3**i)) for i in range(20))})
    ]


def plan_epoch(
    lengths: np.ndarray,
    batch_size: int,
    shapes: tuple[RowShape, ...],
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    drop_remainder: bool = True,
) -> EpochPlan:
    """Place every pair of one epoch.

    Args:
      lengths: int `[n, 3]` tokens of prompt, chosen and rejected of every pair.
      batch_size: pairs a step, exactly.
      shapes: from `choose_ladder` for the same lengths.
      seed, epoch: the order and every exchange are a function of them.
      shuffle: a new random order every epoch, and balanced batches; False keeps file order and the batches it gives.
      drop_remainder: leave out the last, short batch of an epoch.

    Returns:
      The placement; no pair occurs twice, and only the remainder is missing.
    """
    lengths = np.asarray(lengths, np.int64)
    batches = _batches(_order(len(lengths), shuffle=shuffle, seed=seed, epoch=epoch), batch_size, drop_remainder)
    first = shapes[0]
    target = np.asarray(first.widths, np.int64)
    placed = _deal(batches, lengths, first.rows, first.pairs, target)
    placed = _balance(placed, lengths, target, np.random.default_rng([seed, epoch, 1]), across=shuffle)
    need = _needed(placed, lengths)
    index = np.full(len(placed), len(shapes) - 1, np.int8)
    for i in reversed(range(len(shapes))):
        if shapes[i].rows == first.rows and shapes[i].pairs == first.pairs:
            index[(need <= np.asarray(shapes[i].widths)).all(1)] = i
    out = []
    for i, rows in zip(index, placed, strict=True):
        shape = shapes[i]
        if rows.shape == (shape.rows, shape.pairs):
            out.append(_left(rows))
        else:  # the shape that always fits: one pair a row
            alone = np.full((shape.rows, 1), EMPTY, np.int64)
            members = np.sort(rows[rows >= 0])
            alone[: len(members), 0] = members
            out.append(alone)
    return EpochPlan(shapes, index, out)


def _left(rows: np.ndarray) -> np.ndarray:
    """Empty places last in each row."""
    return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)


def efficiency(plan: EpochPlan, lengths: np.ndarray) -> float:
    """Fraction of computed tokens that are real, over the plan."""
    computed = sum(plan.shapes[i].tokens for i in plan.shape)
    real = sum(int(lengths[rows[rows >= 0]].sum()) for rows in plan.placed)
    return real / max(1, computed)
