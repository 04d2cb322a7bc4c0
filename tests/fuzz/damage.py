"""What can be done to a file: shapes that JSON has and should not, and what befalls files of any kind."""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# In place of the whole of a JSON file, as text: what is JSON, but of another shape, and what hardly is.
WHOLE: dict[str, str | bytes] = {
    "null": "null",
    "true": "true",
    "number": "17",
    "text": '"a text"',
    "list": "[]",
    "list-of-lists": "[[1, [2]]]",
    "list-of-objects": '[{"step": 1}]',
    "empty-object": "{}",
    "other-object": '{"a": {"b": [1, null]}}',
    "nothing": "",
    "white": " \n\n",
    "half": '{"a": [1, ',
    "binary": bytes(range(256)),
    "not-utf8": b'{"a": "\xff\xfe"}',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "with-bom": b"\xef\xbb\xbf{}",
    "nan": '{"a": NaN}',
    "many-digits": '{"a": ' + "9" * 5000 + "}",
    "deep": "[" * 100_000,
    "deep-objects": '{"a":' * 100_000,
    "escape": '{"\\u001b[31m\\nerror: forged": "\\u001b[2J"}',
    "surrogate": '{"\\ud800": "\\udfff"}',
}
# In place of one value of a JSON object.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "fraction": 0.5,
    "huge": 2**63,
    "enormous": 10**30,
    "nan": math.nan,
    "infinite": math.inf,
    "text": "a text",
    "empty-text": "",
    "number-as-text": "12",
    "escape": "\x1b[31mred\x1b[2J\nerror: forged",
    "markup": "</script><img src=x onerror=alert(1)>",
    "long": "x" * 1_000_000,
    "parent": "../../../../home/.profile",
    "list": [],
    "list-of-null": [None],
    "nested": [[[{"a": []}]]],
    "object": {},
    "object-of-null": {"a": None},
}


def whole(path: Path, how: str) -> None:
    content = WHOLE[how]
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def paths_of(value: Any, most: int = 4) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value, down to `most` levels; of a list the first entry."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, below in items:
        yield (key,)
        if most > 1:
            yield from ((key, *rest) for rest in paths_of(below, most - 1))


def put(value: Any, at: tuple[str | int, ...], new: Any) -> Any:
    """A copy with another value at a place; `new` is `GONE`: without it."""
    changed = copy.deepcopy(value)
    *before, last = at
    inner = changed
    for key in before:
        inner = inner[key]
    if new is GONE:
        del inner[last]
    else:
        inner[last] = new
    return changed


GONE = object()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _full_directory(path: Path) -> None:
    _directory(path)
    (path / "inner").write_text("x")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _linked(target: str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return do


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[-1] ^= 0x10
    path.write_bytes(bytes(content))


def _shift(path: Path) -> None:
    """The second half moves down by a byte."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" + content[len(content) // 2 : -1])


# What befalls a file of any kind.
ANY_FILE: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": _cut,
    "flipped": _flip,
    "last-flipped": _flip_last,
    "shifted": _shift,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 100),
    "zeros": lambda path: path.write_bytes(b"\0" * len(path.read_bytes())),
    "directory": _directory,
    "full-directory": _full_directory,
    "fifo": _fifo,
    "endless": _linked("/dev/zero"),
    "link-to-itself": lambda path: _linked(path.name)(path),
    "link-to-nothing": _linked("nowhere"),
    "not-to-be-read": lambda path: path.chmod(0),
}


def write_json(path: Path, value: Any) -> None:
    """As Python writes it: NaN and lone surrogates too."""
    path.write_text(json.dumps(value, indent=1))
