"""The largest batch that fits, by as few compiles as the memory's growth allows."""

from collections.abc import Callable

Need = Callable[[int], float | None]  # what a batch needs in bytes; None: it does not fit


def largest_batch(need: Need, start: int, unit: int, most: int, room: float) -> int:
    """The largest batch that fits, a multiple of `unit`; 0 if none does.

    Memory grows by the pair nearly evenly, so what two batches need tells which one to try next. Where that is wrong,
    halving takes over: what is found fits, and the next larger one does not.

    Args:
      need: what a batch needs; asked once for each that is tried.
      start: the batch to begin with, a multiple of `unit`.
      unit: what batches divide by.
      most: pairs that there are.
      room: bytes that there are.
    """
    fitting, too_large = _bracket(need, start, unit, most)
    failed = False
    while fitting and too_large - max(fitting) > unit:
        known = sorted(fitting)
        guess = middle = (known[-1] + too_large) / 2
        if len(known) > 1:
            slope = (fitting[known[-1]] - fitting[known[-2]]) / (known[-1] - known[-2])
            if slope > 0:
                guess = known[-1] + (room - fitting[known[-1]]) / slope
        # Not far beyond what is known: where little grew, a slope says nothing.
        guess = min(guess, middle if failed else 4 * known[-1])
        guess = int(min(max(guess, known[-1] + unit), too_large - unit) // unit * unit)
        found = need(guess)
        failed = found is None
        if found is None:
            too_large = guess
        else:
            fitting[guess] = found
    return max(fitting, default=0)


def _bracket(need: Need, start: int, unit: int, most: int) -> tuple[dict[int, float], int]:
    """Batches that fit with what they need, and the smallest known one that does not (or there are no more pairs)."""
    fitting: dict[int, float] = {}
    batch, limit = start, most // unit * unit + unit
    while batch >= unit:
        found = need(batch)
        if found is not None:
            fitting[batch] = found
            break
        limit, batch = batch, batch // 2 // unit * unit
    while fitting and len(fitting) < 3 and 2 * max(fitting) < limit:
        batch = 2 * max(fitting)
        found = need(batch)
        if found is None:
            limit = batch
            break
        fitting[batch] = found
    return fitting, limit
