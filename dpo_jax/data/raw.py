"""What a file gives, before anything is known of its form: rows, and lines that are none."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadLine:
    """A line that gives no row: `reason` is counted, `text` is what stood there (broken bytes replaced)."""

    reason: str
    text: str


class ColumnarRow(dict[str, Any]):
    """A row of a columnar file: nulls inside its structs pad them to the keys that other rows have."""


class NotRowsError(ValueError):
    """The file is sound and holds something else than rows; the message says what, and what to do."""
