"""Rows of JSON: lines, an array, objects one behind the other, and objects around a list of rows."""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpo_jax.data.forms.table import resolve
from dpo_jax.data.raw import LONGEST_ROW, TOO_LONG, BadLine, NotRowsError

Numbered = tuple[int, dict[str, Any] | BadLine]

CHUNK = 1 << 20
_LONGEST_OBJECT = 256 << 20  # bytes of one object around all rows of a file
_MOST_MEMORY = 1 << 30  # that such an object may need
_LONGEST_LINE = 256 << 20  # bytes; a longer one is not read to its end
# An object that may hold rows: its first value is a list or an object.
_AROUND_ROWS = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*[\[{]')
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # what is between the rows of a JSON array
_BLANKS = re.compile(r"[ \t\r\n]*")
_TURNS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})  # a message has one of these sets of keys
# Keys under which files keep their rows, where nothing else tells that they are rows.
_WRAPPERS = ("data", "rows", "examples", "train", "items", "records", "instances", "samples", "pairs", "entries")


def json_rows(stream: Any) -> Iterator[Numbered]:
    """Each row with its line (of an object around rows: its number), from a stream of bytes.

    One array if the first character that is no white space is `[`. Else objects: one a line or several, or spread over
    lines. Of a single object that holds a list of rows, or a list for each column, these rows.

    ValueError if it cannot be read to its end.
    """
    head = stream.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    if head.startswith(b"["):
        yield from _array_rows(stream)
        return
    longest = _LONGEST_OBJECT if _AROUND_ROWS.match(head) else LONGEST_ROW
    rows = _object_rows(stream, longest) if _is_pretty(head) else _line_rows(stream, longest)
    first, second = next(rows, None), next(rows, None)
    if first is None:
        return
    inner = _rows_inside(first[1]) if second is None and isinstance(first[1], dict) else None
    if inner is not None:
        yield from enumerate(inner, 1)
        return
    for number, row in itertools.chain([first], [] if second is None else [second], rows):
        yield number, _oversized() if isinstance(row, _LongObject) else row


def _is_pretty(head: bytes) -> bool:
    """True if objects are spread over lines: the first is no JSON, and the next one begins with a key or an end."""
    first, _, rest = head.partition(b"\n")
    if not first.startswith(b"{") or rest.lstrip()[:1] not in (b'"', b"}"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


class _LongObject(dict[str, Any]):
    """An object that is too long for a row; it may hold rows."""


def bounded_lines(stream: Any, longest_first: int = LONGEST_ROW) -> Iterator[bytes | None]:
    """The lines of a stream of bytes; None in place of one that is too long, which is skipped piece by piece.

    NotRowsError if a line is so long that even skipping it would take its time: a few megabytes of gzip may hold any
    number of them.
    """
    longest, number = longest_first, 0
    while line := stream.readline(longest + 1):
        number += 1
        if len(line) <= longest:
            yield line
        else:
            length = len(line)
            while line and not line.endswith(b"\n"):
                line = stream.readline(CHUNK)
                length += len(line)
                if length > _LONGEST_LINE:
                    raise NotRowsError(
                        f"line {number} is longer than {_LONGEST_LINE >> 20} MiB; a row has at most "
                        f"{LONGEST_ROW >> 20} MiB, in a line of its own"
                    )
            yield None
        longest = LONGEST_ROW


def _oversized() -> BadLine:
    return BadLine("oversized", f"this row {TOO_LONG}")


def _line_rows(stream: Any, longest_first: int) -> Iterator[Numbered]:
    for number, line in enumerate(bounded_lines(stream, longest_first), 1):
        if line is None:
            yield number, _oversized()
            continue
        row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if len(row) > LONGEST_ROW:
            _check_memory(row, number)
            yield from ((number, _as_long(one)) for one in _rows_in_line(row))
        elif row.strip():
            yield from ((number, one) for one in _rows_in_line(row))


def _as_long(row: dict[str, Any] | BadLine) -> dict[str, Any] | BadLine:
    return _LongObject(row) if isinstance(row, dict) else _oversized()


def _check_memory(text: bytes | str, line: int) -> None:
    """Refuse JSON that would become more objects than memory is good for: two characters may stand for 64 bytes."""
    marks: Any = ("{", "[", '"', ",") if isinstance(text, str) else (b"{", b"[", b'"', b",")
    memory = len(text) + sum(text.count(mark) * each for mark, each in zip(marks, (72, 72, 28, 16), strict=True))
    if memory > _MOST_MEMORY:
        raise NotRowsError(f"line {line}: one object of {len(text) >> 20} MiB holds all rows; write each to a line")


def _rows_in_line(line: bytes) -> list[dict[str, Any] | BadLine]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return [BadLine("invalid_utf8", line.decode("utf-8", errors="replace").rstrip("\n"))]
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, a number of 5,000 digits, brackets 10,000 deep
        return _concatenated(text) or [BadLine("invalid_json", text.rstrip("\n"))]
    return [row if isinstance(row, dict) else BadLine("not_an_object", text.rstrip("\n"))]


def _concatenated(text: str) -> list[dict[str, Any] | BadLine]:
    """Objects that stand one behind the other in a line; none if it holds anything else."""
    scan, at = json.JSONDecoder().raw_decode, 0
    found: list[dict[str, Any] | BadLine] = []
    while (at := _BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # it matches nothing, too
        try:
            value, at = scan(text, at)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        found.append(value)
    return found


def _array_rows(stream: Any) -> Iterator[Numbered]:
    """The elements of a JSON array, decoded from a sliding window.

    Broken UTF-8 becomes lone surrogates, which the row's parser refuses: one bad row, not a lost file.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scan, window, line, ended = json.JSONDecoder().raw_decode, decode(stream.read(CHUNK)), 1, False
    at, first = window.index("[") + 1, True
    line += window.count("\n", 0, at)
    while True:
        begin = _BETWEEN.match(window, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        commas, here = window.count(",", at, begin), line + window.count("\n", at, begin)
        if window[begin : begin + 1] == "]":
            # Rows after the array would be lost without a word.
            rest = window[begin + 1 :].strip()
            while not rest and (more := stream.read(CHUNK)):
                rest = decode(more).strip()
            if rest:
                raise ValueError(
                    f"line {here}: after the JSON array's end comes {rest[:20]!r}; a file is one array, or an object "
                    "a line"
                )
            return
        if begin < len(window) and commas != (not first):
            raise ValueError(f"line {here}: {'a comma is missing' if commas == 0 else 'too many commas'} between rows")
        try:
            value, end = scan(window, begin)
            if end == len(window) and not ended:  # "12" may be the beginning of "123"
                raise ValueError
        except (ValueError, RecursionError):
            if ended:
                raise ValueError(f"line {here}: the array breaks off or holds no JSON here") from None
            if len(window) - at > LONGEST_ROW:
                raise NotRowsError(f"line {here}: the row that begins here {TOO_LONG}, or is no JSON") from None
            (window, ended), at = _longer(stream, decode, window[at:]), 0
            continue
        if end - begin > LONGEST_ROW:
            yield here, _oversized()
        else:
            yield here, value if isinstance(value, dict) else BadLine("not_an_object", window[begin:end])
        line, at, first = here + window.count("\n", begin, end), end, False


def _object_rows(stream: Any, longest_first: int) -> Iterator[Numbered]:
    """Objects one behind the other, each over several lines, decoded from a sliding window."""
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scan, window, line, at, ended = json.JSONDecoder().raw_decode, "", 1, 0, False
    longest = longest_first
    while True:
        begin = _BLANKS.match(window, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if begin == len(window) and ended:
            return
        here = line + window.count("\n", at, begin)
        try:
            value, end = scan(window, begin)
        except (ValueError, RecursionError):
            if ended:
                raise ValueError(f"line {here}: the object breaks off or holds no JSON here") from None
            if len(window) - at > longest:
                words = f"is longer than {longest >> 20} MiB, or is no JSON"
                raise NotRowsError(f"line {here}: the object that begins here {words}") from None
            (window, ended), at = _longer(stream, decode, window[at:]), 0
            if len(window) > LONGEST_ROW:
                _check_memory(window, here)
            continue
        row = value if isinstance(value, dict) else BadLine("not_an_object", window[begin:end])
        yield here, row if end - begin <= LONGEST_ROW else _as_long(row)
        longest = LONGEST_ROW
        line, at = here + window.count("\n", begin, end), end


def _longer(stream: Any, decode: Callable[[bytes, bool], str], window: str) -> tuple[str, bool]:
    """A window and what follows it, and whether the file has ended.

    It grows to twice its length each time, so that one very long row costs linear time.
    """
    chunk = stream.read(max(CHUNK, len(window)))
    return window + decode(chunk, not chunk), not chunk


def _rows_inside(one: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a file that is one object around them; None if the object is a row itself.

    NotRowsError if there are several lists of rows.
    """
    if (columns := _by_column(one)) is not None:
        return columns
    if resolve(tuple(one)):
        return None
    lists = [key for key, value in one.items() if _are_rows(key, value, alone=len(one) == 1)]
    if len(lists) > 1:
        raise NotRowsError(
            f"one object with several lists of rows ({', '.join(lists)}); write each to a file of its own"
        )
    return list(one[lists[0]]) if lists else None


def _are_rows(key: str, value: Any, alone: bool) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return False
    if resolve(tuple(value[0])):
        return True
    are_turns = all(any(turn <= row.keys() for turn in _TURNS) for row in value)  # of the one row that there is
    return (alone or key.lower() in _WRAPPERS) and not are_turns


def _by_column(one: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of an object with a list, or a mapping by row number, for each column."""
    if not one or not resolve(tuple(one)):
        return None
    values = list(one.values())
    if all(isinstance(value, dict) and value and all(key.isdigit() for key in value) for value in values):
        if any(value.keys() != values[0].keys() for value in values):
            return None
        return [dict(zip(one, row, strict=True)) for row in zip(*(value.values() for value in values), strict=True)]
    if not all(isinstance(value, list) and len(value) == len(values[0]) for value in values) or not values[0]:
        return None
    messages = (isinstance(item, dict) and ("role" in item or "from" in item) for item in itertools.chain(*values))
    if any(messages):  # a row of message lists that are as long as each other
        return None
    return [dict(zip(one, row, strict=True)) for row in zip(*values, strict=True)]
