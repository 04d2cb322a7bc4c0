"""What a file gives, before anything is known of its form: rows, and lines that are none."""

from dataclasses import dataclass
from typing import Any

LONGEST_ROW = 4 << 20  # bytes of a line, characters of a row: more than any model reads; tokenising takes 200 times it
TOO_LONG = f"is longer than {LONGEST_ROW >> 20} MiB"


@dataclass(frozen=True)
class BadLine:
    """A line that gives no row: `reason` is counted, `text` is what stood there (broken bytes replaced)."""

    reason: str
    text: str


class ColumnarRow(dict[str, Any]):
    """A row of a columnar file: nulls inside its structs pad them to the keys that other rows have."""


class NotRowsError(ValueError):
    """The file is sound and holds something else than rows; the message says what, and what to do."""


def size_of(value: Any) -> int:
    """Characters and bytes of all texts in a row or a part of it, and one for every other value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(size_of, value.values())) + len(value)
    return sum(map(size_of, value)) + 1 if isinstance(value, list | tuple) else 1
