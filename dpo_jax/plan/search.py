"""The largest batch that fits, by as few compiles as the memory's growth allows."""

from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.model.config import ModelConfig
from dpo_jax.parallel.mesh import row_shards
from dpo_jax.plan.compile import TooLargeError, train_program
from dpo_jax.plan.draft import Draft, make_draft
from dpo_jax.plan.lengths import Lengths, find_lengths
from dpo_jax.plan.text import tried_line

Need = Callable[[int], float | None]  # what a batch needs in bytes; None: it does not fit


def search_batches(draft: Draft, model: ModelConfig, lengths: Lengths, first: Mapping[str, Any]) -> int:
    """The largest batch that fits, in steps of what rows divide by, up to all pairs of an epoch; 0 if none does.

    Args:
      draft, first: what was planned, and its report.
      model, lengths: what it was planned for.
    """
    s, room = draft.settings, draft.topology.generation.hbm_bytes

    def need(batch: int) -> float | None:
        if batch == s.batch.size:
            return first["memory"]["largest_shape_total"] if first["fits"] else None
        larger = s.with_batch_size(batch)
        other = make_draft(larger, model, find_lengths(larger) if lengths.drawn else lengths, draft.topology)
        try:
            needed: float | None = train_program(other, other.widest_shape).total_bytes
        except TooLargeError:
            needed = None
        # As a plan's headroom: buffers that are never live together make the sum more than what the compiler needs.
        needed = None if needed is None or needed > room else needed
        print(tried_line(batch, needed), flush=True)
        return needed

    return largest_batch(need, s.batch.size, row_shards(draft.layout.mesh) * s.batch.microbatches, lengths.pairs, room)


def largest_batch(need: Need, start: int, unit: int, most: int, room: float) -> int:
    """The largest batch that fits, a multiple of `unit`; 0 if none does.

    Memory grows by the pair nearly evenly, so what two batches need tells which one to try next. Where that is wrong,
    halving takes over: the batch that is returned fits, and the next larger one does not.

    Args:
      need: what a batch needs; asked once for each that is tried.
      start: the batch to begin with, a multiple of `unit`.
      unit: what batches divide by.
      most: pairs that there are.
      room: bytes that there are.
    """
    fitting: dict[int, float] = {}
    batch, too_large = start, most // unit * unit + unit
    while batch >= unit:
        needed = need(batch)
        if needed is None:
            too_large = batch
        else:
            fitting[batch] = needed
        if fitting and too_large - max(fitting) <= unit:
            break
        batch = _next_batch(fitting, too_large, unit, room, missed=needed is None)
    return max(fitting, default=0)


def _next_batch(fitting: dict[int, float], too_large: int, unit: int, room: float, *, missed: bool) -> int:
    """The batch to try next; `missed`: the one before did not fit."""
    *_, below, largest = (0, 0, *sorted(fitting))
    if not largest:
        return too_large // 2 // unit * unit
    if len(fitting) < 3 and 2 * largest < too_large:
        return 2 * largest
    guess = middle = (largest + too_large) / 2
    if below and (slope := (fitting[largest] - fitting[below]) / (largest - below)) > 0:
        guess = largest + (room - fitting[largest]) / slope
    # Not far beyond what fits: where little grew, a slope tells nothing.
    guess = min(guess, middle if missed and too_large != 2 * largest else 4 * largest)
    return int(min(max(guess, largest + unit), too_large - unit) // unit * unit)
