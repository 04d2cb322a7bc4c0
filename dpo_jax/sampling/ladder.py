"""The sizes that programs are compiled for: few, so that little is compiled, and near to what is there."""

import dataclasses

from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.programs import Rung

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COUNTS = (1, 4, 16, 64, 256)  # of prompts or answers that begin together


def at_least(sizes: tuple[int, ...], size: int) -> int:
    """The smallest of `sizes` that has room for `size`, or the largest."""
    return next((x for x in sizes if x >= size), sizes[-1])


def width_of(tokens: int) -> int:
    """Columns for so many tokens: steps of a quarter to a half, from 32."""
    width = 32
    while width < tokens:
        step = 1 << (width.bit_length() - 1)
        width += step // 2
    return width


def power_of_two(size: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(0, size - 1).bit_length()


def packed_shape(shards: int, count: int, tokens: int) -> RowShape:
    """Rows of prompts, one on each of `shards` devices, for at most so many prompts and tokens of one."""
    return prompts_shape(shards, *packed_size(count, tokens))


def packed_size(count: int, tokens: int) -> tuple[int, int]:
    """Columns and places of a row of prompts."""
    return width_of(tokens), at_least(COUNTS, count)


def prompts_shape(shards: int, width: int, places: int) -> RowShape:
    """Rows of prompts alone, one on each of `shards` devices."""
    return RowShape(width, (0,), shards, places)


def first_rung(rows: int, n: int, prompts: int, longest: int, limit: int, page: int) -> Rung:
    """Where sampling begins.

    Args:
      rows: the most answers at once, of a device.
      n, prompts: answers to a prompt, and prompts of a device.
      longest: tokens of the longest prompt.
      limit: the most tokens of an answer.
      page: columns of a page.
    """
    rows = min(rows, at_least(ROWS, n * prompts))
    answers = min(n, rows)
    # A prompt whose answers have ended but for one keeps its slot: there are more slots than full groups of answers.
    slots = rows if n == 1 else min(rows, max(2 * rows // answers, 1), at_least(ROWS, prompts))
    most = -(-(limit - 1) // page)  # pages of an answer
    row_pages = min(power_of_two(most), 4) if most else 0
    return Rung(rows, slots, width_of(longest), rows * min(2, most), row_pages, answers)


def grown(rung: Rung, missing: int, row_pages: int) -> Rung:
    """With room for so many pages more, and for so many of a row."""
    pages = rung.pages
    while pages < rung.pages + missing:
        pages *= 2
    return dataclasses.replace(rung, pages=pages, row_pages=max(rung.row_pages, power_of_two(row_pages)))


def shrunk(rung: Rung, rows: int, prompts: int, pages: int, longest: int) -> Rung:
    """The smallest rung for so many rows, prompts, pages of a device, and prompts no longer than `longest`."""
    fewer = min(rung.rows, at_least(ROWS, rows))
    answers = min(rung.answers, fewer)
    slots = fewer if rung.is_plain else min(rung.prompts, at_least(ROWS, prompts))
    per_row = max(1, rung.pages // rung.rows)
    kept = min(rung.pages, max(per_row * fewer, power_of_two(pages))) if rung.pages else 0
    return Rung(fewer, slots, min(rung.width, width_of(longest)), kept, rung.row_pages, answers)
