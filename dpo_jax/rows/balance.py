"""Which groups share a row: dealing batches into rows, and exchanging groups until the rows are evenly filled.

Everything works on index arrays: `batches` `[n, batch_size]` and `placed` `[n, rows, places]` hold group numbers, EMPTY
where there is none. `lengths` `[N, S]` are what groups put into each of the S slots of a row, `target` `[S]` the slots'
widths (where completions may go into any slot, both as `slots.balanced` makes them).
"""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence

import numpy as np

from dpo_jax.rows.shape import Order, RowShape
from dpo_jax.rows.slots import balanced, has_free_slots, slot_loads

EMPTY = -1
# At most this part of a batch of long groups is long groups: the rest are any others.
LONG_PART = 0.25
ROUNDS = 200
FITTING = 60  # rounds of `_fit_slots`, with so many exchanges drawn for a row in each:
DRAWS = 16
# Possible exchanges weighed at once: few enough for the processor's cache.
CHUNK = 200_000


def deal(batches: np.ndarray, lengths: np.ndarray, rows: int, places: int, target: np.ndarray) -> np.ndarray:
    """Put batches `[n, batch_size]` (EMPTY allowed) into `[n, rows, places]`: longest first, on the emptiest row."""
    n, size = batches.shape
    weights = (lengths / np.maximum(target, 1)).sum(-1)
    weight = np.where(batches >= 0, weights[batches], -1.0)
    by_size = np.take_along_axis(batches, np.argsort(-weight, axis=1, kind="stable"), axis=1)
    by_size = np.pad(by_size, ((0, 0), (0, -size % rows)), constant_values=EMPTY)
    placed = np.full((n, rows, places), EMPTY, np.int64)
    load = np.zeros((n, rows))
    for k, dealt in enumerate(by_size.reshape(n, -1, rows).swapaxes(0, 1)):
        emptiest = np.argsort(load, axis=1, kind="stable")
        np.put_along_axis(placed[:, :, k], emptiest, dealt, axis=1)
        added = np.where(dealt >= 0, weights[dealt], 0.0)
        np.put_along_axis(load, emptiest, np.take_along_axis(load, emptiest, axis=1) + added, axis=1)
    return placed


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """NumPy lets other threads run while it computes."""
    return concurrent.futures.ThreadPoolExecutor(max_workers=4, thread_name_prefix="balance")


def _overflow(sums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Squared relative overflow of rows `[..., S]` beyond their slots, summed over slots."""
    return (np.maximum(sums - target, 0.0) ** 2 / np.maximum(target, 1.0) ** 2).sum(-1)


def _exchange(a: np.ndarray, b: np.ndarray, same_batch: np.ndarray, lengths: np.ndarray, target: np.ndarray) -> None:
    """For rows `a[i], b[i]` (`[h, K]`, changed in place), make the one exchange of groups that lowers overflow most.

    Exchanging a group with an empty place moves it; that keeps batches exact only within one batch.
    """
    la, lb = lengths[a], lengths[b]  # [h, K, S]; index -1 is the appended row of zeros
    sa, sb = la.sum(1), lb.sum(1)
    before = _overflow(sa, target) + _overflow(sb, target)
    after = np.zeros((len(a), a.shape[1], a.shape[1]), np.float32)
    for slot, width in enumerate(target):  # slot by slot: NumPy is slow along a short axis
        delta = lb[:, None, :, slot] - la[:, :, None, slot]
        for over in (sa[:, None, None, slot] - width + delta, sb[:, None, None, slot] - width - delta):
            np.maximum(over, 0.0, out=over)
            np.multiply(over, over, out=over)
            over *= 1.0 / max(width, 1.0) ** 2
            after += over
    legal = same_batch[:, None, None] | ((a < 0)[:, :, None] == (b < 0)[:, None, :])
    weighed = np.where(legal, after, np.inf).reshape(len(a), -1)
    best = np.argmin(weighed, axis=1)
    # Less than rounding is no gain.
    h = np.flatnonzero(weighed[np.arange(len(a)), best] < before * (1 - 1e-4))
    i, j = best[h] // a.shape[1], best[h] % a.shape[1]
    a[h, i], b[h, j] = b[h, j], a[h, i]


def _emptiest(sums: np.ndarray, hot: np.ndarray, target: np.ndarray) -> np.ndarray:
    """For every overfull row a row with room in the slot that it overflows most: the fullest meet the emptiest."""
    over = (sums - target) / np.maximum(target, 1.0)
    worst = over[hot].argmax(1)
    other = np.empty_like(hot)
    for slot in range(len(target)):
        mine = np.flatnonzero(worst == slot)
        fullest = mine[np.argsort(-over[hot[mine], slot], kind="stable")]
        other[fullest] = np.argsort(over[:, slot], kind="stable")[: len(mine)]
    return other


def _partners(rng: np.random.Generator, hot: np.ndarray, rows_per_batch: int, total: int, across: bool) -> np.ndarray:
    """A partner for every overfull row: any row, or one of its own batch."""
    if across:
        return rng.integers(0, total, len(hot))
    return hot // rows_per_batch * rows_per_batch + rng.integers(0, rows_per_batch, len(hot))


def _apart(both: np.ndarray) -> np.ndarray:
    """Which exchanges between rows `[h, 2]` can be made at a time: a row takes part in the first that names it."""
    first = np.zeros(both.size, bool)
    first[np.unique(both.reshape(-1), return_index=True)[1]] = True
    return first[::2] & first[1::2]


def balance(
    placed: np.ndarray, lengths: np.ndarray, widths: np.ndarray, rng: np.random.Generator, across: bool
) -> np.ndarray:
    """Exchange groups between rows of `[n, rows, K]` until all fit in slots of these widths or no luck is left.

    `across`: between batches too.
    """
    placed = _balance(placed, balanced(lengths), balanced(widths), rng, across)
    return _fit_slots(placed, lengths, widths, rng, across) if has_free_slots(widths) else placed


def _balance(
    placed: np.ndarray, lengths: np.ndarray, target: np.ndarray, rng: np.random.Generator, across: bool
) -> np.ndarray:
    n, rows, K = placed.shape
    flat = placed.reshape(n * rows, K).copy()
    lengths = np.concatenate([lengths, np.zeros((1, lengths.shape[1]), lengths.dtype)]).astype(np.float32)
    target = target.astype(np.float32)
    chunk = max(1, CHUNK // (K * K))
    overflow = _overflow(lengths[flat].sum(1), target)
    for round_ in range(ROUNDS):
        hot = np.flatnonzero(overflow > 0)
        if len(hot) == 0:
            break
        # Moves inside a batch are the only ones that can change how many groups a row has: take turns.
        # While many rows are overfull, choosing partners pays; the last few find theirs by chance.
        if across and round_ % 4 == 2 and len(hot) > len(flat) // 20:
            other = _emptiest(lengths[flat].sum(1), hot, target)
        else:
            other = _partners(rng, hot, rows, len(flat), across and round_ % 2 == 0)
        both = np.stack([hot, other], 1)[rng.permutation(len(hot))]
        both = both[_apart(both) & (both[:, 0] != both[:, 1])]

        def exchange(start: int, both: np.ndarray = both) -> None:
            x, y = both[start : start + chunk].T
            a, b = flat[x], flat[y]
            _exchange(a, b, x // rows == y // rows, lengths, target)
            flat[x], flat[y] = a, b
            overflow[x], overflow[y] = _overflow(lengths[a].sum(1), target), _overflow(lengths[b].sum(1), target)

        starts = range(0, len(both), chunk)
        # No row occurs twice, so the order in which threads come does not matter.
        list(_threads().map(exchange, starts) if len(starts) > 1 else map(exchange, starts))
    return flat.reshape(n, rows, K)


def consecutive(order: np.ndarray, batch_size: int, drop_remainder: bool) -> np.ndarray:
    """Consecutive batches `[n, batch_size]` of an order; the last one padded with EMPTY or dropped."""
    n = len(order) // batch_size if drop_remainder else -(-len(order) // batch_size)
    padded = np.full(n * batch_size, EMPTY, np.int64)
    padded[: min(len(order), len(padded))] = order[: len(padded)]
    return padded.reshape(n, batch_size)


def needed(placed: np.ndarray, lengths: np.ndarray, widths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Widths `[n, 1+n]` that each batch's fullest rows need, in rows that are filled for these widths."""
    return slot_loads(lengths, placed, widths).max(1)


def long_together(
    order: np.ndarray, lengths: np.ndarray, widths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Reorder so that groups too long for `widths` meet in few batches.

    Returns:
      The order, and bool per batch (of `batch_size`, the short last one included): whether it is for long groups.
    """
    n_batches = -(-len(order) // batch_size)
    marked = np.zeros(n_batches, bool)
    long = (lengths[order] > widths).any(1)
    full = len(order) // batch_size
    share = max(1, int(batch_size * LONG_PART))
    batches = min(full, -(-int(long.sum()) // share))
    if batches == 0:
        marked[:] = long.any()  # fewer groups than one batch
        return order, marked
    marked[np.sort(rng.choice(full, batches, replace=False))] = True
    home = np.zeros(len(order), bool)  # the places of marked batches, in turns, so that long groups spread over them
    home[: full * batch_size] = np.repeat(marked[:full], batch_size)
    places = np.flatnonzero(home).reshape(batches, batch_size).T.reshape(-1)
    taken = places[: long.sum()]
    if len(taken) < long.sum():
        return order, np.ones(n_batches, bool)  # most groups are long: no batch is special
    out = np.full(len(order), EMPTY, np.int64)
    out[taken] = order[long]
    out[out == EMPTY] = order[~long]
    return out, marked


def members(placed: np.ndarray, batch_size: int) -> np.ndarray:
    """The groups of every batch `[n, batch_size]` of a placement, in no order that depends on its rows."""
    return -np.sort(-placed.reshape(len(placed), -1), axis=1)[:, :batch_size]


def _fit_slots(
    placed: np.ndarray, lengths: np.ndarray, widths: np.ndarray, rng: np.random.Generator, across: bool
) -> np.ndarray:
    """Exchange groups of rows whose completions do not fit slot by slot, though they do together.

    Of several exchanges drawn for each such row, the one that leaves least overflow in both rows.
    """
    n, rows, K = placed.shape
    flat = placed.reshape(n * rows, K).copy()
    over = lambda rows: (np.maximum(slot_loads(lengths, rows, widths) - widths, 0) ** 2).sum(-1)
    overflow = over(flat)
    for _ in range(FITTING):
        hot = np.flatnonzero(overflow > 0)
        if len(hot) == 0:
            break
        draws = max(1, min(DRAWS, CHUNK // 100 // len(hot)))
        x = np.repeat(hot, draws)
        y = _partners(rng, x, rows, len(flat), across)
        i, j = rng.integers(0, K, (2, len(x)))
        a, b, at = flat[x], flat[y], np.arange(len(x))
        legal = (x != y) & ((x // rows == y // rows) | ((a[at, i] < 0) == (b[at, j] < 0)))
        a[at, i], b[at, j] = b[at, j], a[at, i]
        after = np.stack([over(a), over(b)])
        gain = np.where(legal, overflow[x] + overflow[y] - after.sum(0), 0).reshape(len(hot), draws)
        best = np.arange(len(hot)) * draws + gain.argmax(1)
        best = best[gain.max(1) > 0]
        best = best[_apart(np.stack([x[best], y[best]], 1))]
        flat[x[best]], flat[y[best]] = a[best], b[best]
        overflow[x[best]], overflow[y[best]] = after[:, best]
    return flat.reshape(n, rows, K)


# (shape, widths for batches of long groups) -> placement int64 [steps, rows, places], bool [steps]: is for long groups
Placing = Callable[[RowShape, np.ndarray], tuple[np.ndarray, np.ndarray]]


def across_batches(lengths: np.ndarray, batch_size: int, order: Order, epoch: int) -> Placing:
    """Shuffled batches, long groups together, balanced between batches."""

    def place(shape: RowShape, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([order.seed, epoch])
        widths = np.asarray(shape.widths, np.int64)
        ids, marked = long_together(rng.permutation(len(lengths)), lengths, widths, batch_size, rng)
        dealt = consecutive(ids, batch_size, order.drop_remainder)
        return _filled(dealt, marked[: len(dealt)], lengths, shape, wide, rng, across=True)

    return place


def within_batches(batches: np.ndarray, marked: np.ndarray, lengths: np.ndarray, order: Order, epoch: int) -> Placing:
    """Batches `[n, batch_size]` that stay as they are: groups move between the rows of their own batch."""
    rng = lambda: np.random.default_rng([order.seed, epoch, 3])
    return lambda shape, wide: _filled(batches, marked, lengths, shape, wide, rng(), across=False)


def _filled(
    batches: np.ndarray,
    marked: np.ndarray,
    lengths: np.ndarray,
    shape: RowShape,
    wide: np.ndarray,
    rng: np.random.Generator,
    *,
    across: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Common batches aim at `shape`, those of long groups at `wide` widths; see `Placing`."""
    placed = np.empty((len(batches), shape.rows, shape.places), np.int64)
    for part, widths in ((~marked, np.asarray(shape.widths, np.int64)), (marked, wide)):
        if part.any():
            dealt = deal(batches[part], balanced(lengths), shape.rows, shape.places, balanced(widths))
            placed[part] = balance(dealt, lengths, widths, rng, across=across)
    return placed, marked
