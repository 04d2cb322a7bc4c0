"""Which completion of a group goes in which slot, and how wide slots are, where groups have more than two completions.

No loss depends on the slot, so the completions of a row's groups are dealt to the slots that have most room: rows then
need to be balanced in two numbers only, their prompts' tokens and their completions' together. Of one or two
completions, number j is always in slot j, and rows are balanced slot by slot.
"""

import math
from collections.abc import Sequence

import numpy as np

SWAPS = 64  # at most, in a row


def has_free_slots(lengths: np.ndarray) -> bool:
    """Whether lengths or widths `[..., 1+n]` are of more than two completions, which may go in any slot."""
    return lengths.shape[-1] > 3


def by_length(lengths: np.ndarray) -> np.ndarray:
    """Lengths `[N, 1+n]` with each group's completions longest first, where their slots are free."""
    if not has_free_slots(lengths):
        return lengths
    return np.concatenate([lengths[:, :1], -np.sort(-lengths[:, 1:], axis=1)], axis=1)


def balanced(lengths: np.ndarray) -> np.ndarray:
    """What rows are balanced in, of lengths or widths `[..., 1+n]`: every slot, or prompts and completions together."""
    if not has_free_slots(lengths):
        return lengths
    return np.stack([lengths[..., 0], lengths[..., 1:].sum(-1)], axis=-1)


def assign_slots(lengths: np.ndarray, widths: Sequence[int] | np.ndarray) -> np.ndarray:
    """The slot of each completion, int `[R, K, n]`, for lengths `[R, K, n]` of the groups of R rows.

    The longest completions first, each to the slot of most room; then completions of one group change places while that
    takes tokens out of the fullest slot. The result depends on the order of equal completions only.
    """
    R, K, n = lengths.shape
    slots = np.empty((R, K, n), np.int64)
    room = np.tile(np.asarray(widths, np.int64), (R, 1))
    row = np.arange(R)
    order = np.argsort(-lengths.max(-1), axis=1, kind="stable")
    for k in range(K):
        group = order[:, k]
        mine = lengths[row, group]
        longest, roomiest = np.argsort(-mine, axis=1, kind="stable"), np.argsort(-room, axis=1, kind="stable")
        slots[row[:, None], group[:, None], longest] = roomiest
        room[row[:, None], roomiest] -= np.take_along_axis(mine, longest, axis=1)
    hot = row
    for _ in range(SWAPS):
        hot = hot[room[hot].min(1) < 0]
        if not len(hot):
            break
        hot = hot[_swap(hot, lengths, slots, room)]
    return slots


def _swap(hot: np.ndarray, lengths: np.ndarray, slots: np.ndarray, room: np.ndarray) -> np.ndarray:
    """In every `hot` row the one exchange of two completions that helps its fullest slot most; bool: it was made."""
    held = np.argsort(slots[hot], axis=2)  # [h, K, n]: the completion in each slot
    in_slot = np.take_along_axis(lengths[hot], held, axis=2)
    fullest = room[hot].argmin(1)
    left, others = room[hot, fullest][:, None, None], room[hot][:, None, :]
    h = np.arange(len(hot))
    moved = in_slot[h, :, fullest][:, :, None] - in_slot
    gain = moved * (others - left - moved)  # half of what the sum of squared rooms falls by
    gain[h, :, fullest] = 0
    best = gain.reshape(len(hot), -1).argmax(1)
    group, slot = np.divmod(best, lengths.shape[2])
    made = gain[h, group, slot] > 0
    h, rows, group, slot, fullest = h[made], hot[made], group[made], slot[made], fullest[made]
    a, b = held[h, group, fullest], held[h, group, slot]
    slots[rows, group, a], slots[rows, group, b] = slot, fullest
    room[rows, fullest] += moved[h, group, slot]
    room[rows, slot] -= moved[h, group, slot]
    return made


def slot_loads(lengths: np.ndarray, placed: np.ndarray, widths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Tokens in every slot of rows `[..., K]` of groups (-1: none): int `[..., 1+n]`."""
    held = np.concatenate([lengths, np.zeros((1, lengths.shape[1]), lengths.dtype)])[placed]
    if not has_free_slots(lengths):
        return held.sum(-2)
    rows = held.reshape(-1, *held.shape[-2:])
    slots = assign_slots(rows[..., 1:], widths[1:])
    in_slots = np.take_along_axis(rows[..., 1:], np.argsort(slots, axis=-1), axis=-1)
    loads = np.concatenate([rows[..., :1], in_slots], axis=-1).sum(1)
    return loads.reshape(*placed.shape[:-1], lengths.shape[1])


def slot_widths(mean: np.ndarray, least: np.ndarray, groups: float, multiple: int) -> np.ndarray:
    """Widths `[1+n]` for rows of so many groups.

    Where completions may go into any slot, the slots are as equal as the longest completions let them be, in multiples
    of which no more are made than their sum needs.

    Args:
      mean: tokens of a row by slot, `[1+n]`, completions longest first.
      least: tokens that one group puts in a slot, `[1+n]` likewise: each slot has room for these.
      groups: of a row, in the mean.
      multiple: in which widths will be rounded up.
    """
    if not has_free_slots(mean):
        return np.maximum(mean, least)
    total = mean[1:].sum()
    # Every group has a completion in every slot: beside a long one, the shortest of the others.
    low = -(-(least[1:] + mean[-1] * max(0.0, 1 - 1 / groups)) // multiple) * multiple
    levels = np.arange(0, total + 2 * multiple, multiple)
    enough = np.searchsorted(np.maximum(levels[:, None], low).sum(1), total, side="right")
    widths = np.maximum(levels[max(0, enough - 1)], low)
    missing = max(0, math.ceil((total - widths.sum()) / multiple))
    widths[len(widths) - missing :] += multiple
    return np.concatenate([[max(mean[0], least[0])], np.sort(widths)[::-1]])
