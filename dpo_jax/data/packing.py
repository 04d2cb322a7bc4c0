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
# Rows with this fraction of real tokens are taken before others, unless their attention makes them that much dearer.
FILL = 0.95
FILL_WORTH = 1.2
# A slot of the common shapes holds all but this share of the completions (or prompts). The few longer ones would make
# every row of a run that wide; in a shuffled run they meet in a few batches of a wider shape.
LONG_SHARE = 0.004
# At most this part of such a batch is long pairs: the rest are any others.
LONG_PART = 0.25
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
    """Lay batches `[n, batch_size]` (EMPTY allowed) into `[n, rows, slots]`: longest first, on the emptiest row."""
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
        both = both[first.reshape(-1, 2).all(1) & (both[:, 0] != both[:, 1])]
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


def _with_long_together(
    order: np.ndarray, lengths: np.ndarray, widths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Reorder so that pairs too long for `widths` meet in few batches.

    Returns:
      The order, and bool per batch (of `batch_size`, the short last one included): whether it is for long pairs.
    """
    n_batches = -(-len(order) // batch_size)
    marked = np.zeros(n_batches, bool)
    long = (lengths[order] > widths).any(1)
    full = len(order) // batch_size
    share = max(1, int(batch_size * LONG_PART))
    batches = min(full, -(-int(long.sum()) // share))
    if batches == 0:
        marked[:] = long.any()  # fewer pairs than one batch
        return order, marked
    marked[np.sort(rng.choice(full, batches, replace=False))] = True
    home = np.zeros(len(order), bool)  # the places of marked batches, in turns, so that long pairs spread over them
    home[: full * batch_size] = np.repeat(marked[:full], batch_size)
    places = np.flatnonzero(home).reshape(batches, batch_size).T.reshape(-1)
    taken = places[: int(long.sum())]
    if len(taken) < int(long.sum()):
        return order, np.ones(n_batches, bool)  # most pairs are long: no batch is special
    out = np.full(len(order), EMPTY, np.int64)
    out[taken] = order[long]
    out[out == EMPTY] = order[~long]
    return out, marked


def _lay(
    lengths: np.ndarray, batch_size: int, shape: RowShape, wide: np.ndarray, order: dict[str, int | bool]
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch laid into rows: common batches aim at `shape`, those of long pairs at `wide` widths.

    Returns:
      int64 `[steps, rows, places]`, and bool `[steps]`: whether a step is one for long pairs.
    """
    seed, epoch = int(order["seed"]), int(order["epoch"])
    shuffle, drop = bool(order["shuffle"]), bool(order["drop_remainder"])
    rng = np.random.default_rng([seed, epoch if shuffle else 0])  # file order is the same in every epoch
    ids = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    widths = np.asarray(shape.widths, np.int64)
    marked = np.zeros(-(-len(ids) // batch_size), bool)
    if shuffle:
        ids, marked = _with_long_together(ids, lengths, widths, batch_size, rng)
    batches = _batches(ids, batch_size, drop)
    marked = marked[: len(batches)]
    placed = np.empty((len(batches), shape.rows, shape.pairs), np.int64)
    for part, target in ((~marked, widths), (marked, wide)):
        if part.any():
            dealt = _deal(batches[part], lengths, shape.rows, shape.pairs, target)
            placed[part] = _balance(dealt, lengths, target, rng, across=shuffle)
    return placed, marked


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
    longest = _round_up(lengths.max(0), limits.width_multiple)
    order: dict[str, int | bool] = {"seed": seed, "epoch": 0, "shuffle": shuffle, "drop_remainder": drop_remainder}
    size = max(batch_size, SAMPLE_PAIRS)
    sample = lengths[np.random.default_rng([seed, 1]).permutation(len(lengths))[:size]] if shuffle else lengths[:size]
    narrowest = np.quantile(lengths, 1 - LONG_SHARE, axis=0) if shuffle else longest
    found: list[tuple[float, float, list[RowShape]]] = []
    for rows in _row_candidates(batch_size, limits.row_multiple):
        mean = lengths.mean(0) * min(batch_size, len(lengths)) / rows * (1 + SLACK)
        target = _round_up(np.maximum(mean, narrowest), limits.width_multiple)
        cheapest = min((cost for cost, *_ in found), default=math.inf)
        if _cost(rows, target, limits.key_cost) < cheapest * FILL_WORTH:
            found.append(_try_rows(sample, batch_size, rows, target, np.maximum(mean, longest), limits, order))
    cheapest = min(cost for cost, *_ in found)
    filled = [f for f in found if f[1] >= FILL and f[0] <= cheapest * FILL_WORTH]
    shapes = min(filled or found, key=lambda f: f[0])[2]
    if not shuffle:  # what the plan will do is known: the widest shape is made to hold all of it
        placed, _ = _lay(lengths, batch_size, shapes[0], longest, order)
        need = _round_up(_needed(placed, lengths), limits.width_multiple).max(0)
        widest = shapes[-1]
        shapes = [*shapes[:-1], _shape(widest.rows, np.maximum(need, widest.widths), widest.pairs)]
    sure = _shape(int(_round_up(batch_size, limits.row_multiple)), longest, 1)
    return tuple(dict.fromkeys((*shapes, sure)))


def _try_rows(
    sample: np.ndarray,
    batch_size: int,
    rows: int,
    target: np.ndarray,
    wide: np.ndarray,
    limits: RowLimits,
    order: dict[str, int | bool],
) -> tuple[float, float, list[RowShape]]:
    """What a sample makes of `rows` rows: mean cost of a step, fraction of real tokens, and the shapes it needs."""
    shuffle = bool(order["shuffle"])
    shape = _shape(rows, target, _places(batch_size, rows))
    placed, marked = _lay(sample, batch_size, shape, wide, order)
    widths, counts = _rungs(_needed(placed, sample), marked, ROOM if shuffle else 0.0)
    widths = [_round_up(np.maximum(x, target if shuffle else 0), limits.width_multiple) for x in widths]
    widths[-1] = _round_up(np.maximum(widths[-1], sample.max(0)), limits.width_multiple)
    cost = sum(_cost(rows, x, limits.key_cost) * n for x, n in zip(widths, counts, strict=True)) / len(placed)
    computed = sum(rows * int(x.sum()) * n for x, n in zip(widths, counts, strict=True))
    fill = int(sample[placed[placed >= 0]].sum()) / max(1, computed)
    return cost, fill, list(dict.fromkeys(_shape(rows, x, shape.pairs) for x in widths))


def _shape(rows: int, widths: np.ndarray, pairs: int) -> RowShape:
    prompt, chosen, rejected = (int(x) for x in widths)
    return RowShape(rows, prompt, chosen, rejected, pairs)


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
    order: dict[str, int | bool] = {
        "seed": seed,
        "epoch": epoch,
        "shuffle": shuffle,
        "drop_remainder": drop_remainder,
    }
    first = shapes[0]
    wide = np.max([s.widths for s in shapes if s.rows == first.rows and s.pairs == first.pairs], axis=0)
    placed, _ = _lay(lengths, batch_size, first, wide, order)
    need = _needed(placed, lengths)
    bad = np.flatnonzero((need > wide).any(1))
    if len(bad) and shuffle:  # unlucky steps: exchange once more, with some others and all the room there is
        rng = np.random.default_rng([seed, epoch, 2])
        part = np.union1d(bad, rng.permutation(len(placed))[: 8 * len(bad)])
        placed[part] = _balance(placed[part], lengths, wide, rng, across=True)
        need[part] = _needed(placed[part], lengths)
    index = np.full(len(placed), len(shapes) - 1, np.int8)
    for i in reversed(range(len(shapes))):
        if shapes[i].rows == first.rows and shapes[i].pairs == first.pairs:
            index[(need <= np.asarray(shapes[i].widths)).all(1)] = i
    out = []
    for rung, rows in zip(index, placed, strict=True):
        shape = shapes[rung]
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
