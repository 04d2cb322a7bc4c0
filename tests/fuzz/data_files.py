"""Rows, files and directories of data that are not what they should be, inspected as training would read them."""

import gzip
import io
import itertools
import json
import os
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet

from tests.fuzz.cases import PAIRS, Case, Command, Place, data
from tests.fuzz.damage import ANY_FILE, VALUES

GOOD = [{"prompt": f"What is {i} and {i}?", "chosen": f"It is {2 * i}.", "rejected": f"Not {i}!"} for i in range(20)]
# In place of a column's value, besides `damage.VALUES`.
ODD = {
    "control": "a\x00b\x1b[2J\x07",
    "line-ends": "a\r\n\n\nerror: forged\n",
    "lone-surrogate": "\ud800",
    "emoji": "\U0001f600" * 1000,
    "right-to-left": "\u202e\u2066",
    "combining": "e" + "\u0301" * 100_000,
    "special-token": "<|end|><|user|>\n<|assistant|>",
    "megabytes": "word " * 1_000_000,
    "white": " \t\n",
    "messages-without-role": [{"content": "x"}],
    "messages-of-odd-roles": [{"role": "\x1b[31m", "content": "x"}, {"role": 5, "content": None}],
    "messages-of-parts": [{"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}],
    "messages-of-tools": [{"role": "assistant", "tool_calls": [{"function": None}]}],
    "messages-endless": [{"role": "user", "content": "x"}] * 20_000,
    "text-of-json": '[{"role": "user"',
    "deep": json.loads("[" * 900 + "]" * 900),
}
COLUMNS = (
    "\ud800",
    "\x1b[31mred\x1b[2J",
    "a\nerror: forged",
    "\x00",
    "",
    " prompt",
    "__class__",
    "{0}",
    "%s",
    "x" * 100_000,
    "\u202eprompt",
    "prompt\u200b",
    "chosen[0].content",
    "messages",
    "score",
    "label",
    "margin",
    "tools",
    "documents",
    "chat_template",
)


def cases() -> Iterator[Case]:
    for column in ("prompt", "chosen", "rejected", "messages"):
        for how, value in (VALUES | ODD).items():
            for many in ("one", "all"):
                yield _rows(f"rows/{column}/{how}-{many}", _with(column, value, many))
    for number, name in enumerate(COLUMNS):
        yield _rows(f"columns/{number}-further", [row | {name: "x"} for row in GOOD])
        yield _rows(f"columns/{number}-only", [{name: "x", f"{name}2": "y"} for _ in GOOD])
        yield _csv(f"columns/{number}-csv", name)
        good = lambda path: _lines(path / "a.jsonl", GOOD)
        yield _case(f"columns/{number}-as-columns", good, columns=f"prompt:{name}")
    for how, content in TEXTS.items():
        for suffix in ("jsonl", "json", "csv", "parquet", "arrow"):
            yield _case(f"files/{how}-{suffix}", lambda path, c=content, s=suffix: _write(path / f"a.{s}", c))
    for how, do in ANY_FILE.items():
        yield _case(f"file/{how}", _damaged("a.jsonl", do), "a.jsonl")
        yield _case(f"beside/{how}", _damaged("a.jsonl", do, beside=True))
        yield _case(f"gz/{how}", _damaged("a.jsonl.gz", do))
        yield _case(f"parquet/{how}", _damaged("a.parquet", do))
    for how, do in LARGE.items():
        yield _case(f"large/{how}", do)
    for how, do in DIRECTORIES.items():
        yield _case(f"directory/{how}", do)
    for how, name in ADDRESSES.items():
        for kind, key in (("address", "dataset"), ("path", "dataset_path"), ("eval", "eval_path")):
            yield Case(f"data/{kind}/{how}", _address(key, name))


def _case(name: str, make: Callable[[Path], object], file: str = "", **keys: object) -> Case:
    def prepare(place: Place) -> Command:
        directory = place.given / "rows"
        directory.mkdir()
        make(directory)
        return data("inspect", place, dataset=directory / file if file else directory, eval_pairs=4, **keys)

    return Case(f"data/{name}", prepare)


def _damaged(name: str, do: Callable[[Path], object], *, beside: bool = False) -> Callable[[Path], None]:
    """A sound file with something done to it; `beside` another one that stays sound."""

    def make(path: Path) -> None:
        if beside:
            _lines(path / "0.jsonl", GOOD)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), path / name)
        else:
            (path / name).write_bytes(gzip.compress(_text(GOOD)) if name.endswith(".gz") else _text(GOOD))
        do(path / name)

    return make


def _address(key: str, name: str) -> Callable[[Place], Command]:
    def prepare(place: Place) -> Command:
        if "{given}" in name:
            with zipfile.ZipFile(place.given / "a.zip", "w") as packed:
                packed.writestr("a.jsonl", _text(GOOD))
        given = {key: name.replace("{given}", str(place.given))}
        return data("inspect", place, **(given | ({"dataset": "hhh"} if key == "dataset_path" else {})))

    return prepare


def _rows(name: str, rows: list[dict]) -> Case:
    return _case(name, lambda path: _lines(path / "a.jsonl", rows), "a.jsonl")


def _with(column: str, value: object, many: str) -> list[dict]:
    """Good rows, of which one or all have another value."""
    if column == "messages":
        return [{"messages": value, "score": i} for i in range(4 if many == "all" else 1)]
    changed = [row | {column: value} for row in GOOD]
    return changed[:4] if many == "all" else [*GOOD, changed[0]]


def _text(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_bytes(_text(rows))


def _csv(name: str, column: str) -> Case:
    head = f'prompt,chosen,rejected,"{column}"\n'.encode("utf-8", "surrogatepass")
    return _case(name, lambda path: (path / "a.csv").write_bytes(head + b"a,b,c,d\n" * 20))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _bomb(letter: bytes, size: int) -> bytes:
    """A gzip of a long run of one letter, made a piece at a time."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        for _ in range(size // (1 << 24)):
            file.write(letter * (1 << 24))
    return packed.getvalue()


_ARRAY = json.dumps(GOOD).encode()
TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "white": b" \n\n\n",
    "binary": bytes(range(256)) * 10,
    "null-bytes": b"\0" * 10_000,
    "not-utf8": _text(GOOD).replace(b"What", b"\xff\xfe"),
    "utf16": _text(GOOD).decode().encode("utf-16"),
    "utf32": _text(GOOD).decode().encode("utf-32"),
    "half-utf16": _text(GOOD).decode().encode("utf-16")[:-1],
    "array": _ARRAY,
    "array-cut": _ARRAY[:-20],
    "array-of-arrays": b"[[1, 2], [3]]",
    "array-in-object": b'{"data": ' + _ARRAY + b"}",
    "array-then-more": _ARRAY + _ARRAY,
    "scalars": b"1\n2\nnull\n",
    "numbers": b'{"prompt": NaN, "chosen": Infinity, "rejected": 1e999}\n' * 3,
    "many-digits": b'{"prompt": ' + b"9" * 5000 + b"}\n",
    "twice": b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}\n' * 3,
    "deep": b"[" * 200_000,
    "deep-line": b'{"prompt": ' * 50_000 + b"\n",
    "half-line": _text(GOOD)[:-20],
    "carriage-returns": _text(GOOD).replace(b"\n", b"\r"),
    "quotes": b'prompt,chosen,rejected\n"a,b\nc,d',
    "many-columns": ",".join(f"c{i}" for i in range(50_000)).encode() + b"\n" + b"1,\n",
    "ragged": b"prompt,chosen,rejected\na,b\na,b,c,d\n\n,,\n",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "parquet-mark": b"PAR1" + b"\xff" * 200 + b"PAR1",
    "parquet-length": b"PAR1" + b"\xff\xff\xff\x7fPAR1",
    "arrow-mark": b"ARROW1\0\0" + b"\xff" * 200 + b"ARROW1",
    "arrow-length": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"\0" * 100,
    "feather-mark": b"FEA1" + b"\xff" * 100 + b"FEA1",
    "gzip-mark": b"\x1f\x8b" + b"\0" * 100,
    "gzip-in-gzip": gzip.compress(gzip.compress(_text(GOOD))),
    "gzip-trailing": gzip.compress(_text(GOOD)) + b"rubbish",
    "gzip-cut": gzip.compress(_text(GOOD))[:-6],
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "html": b"<!DOCTYPE html><html></html>",
    "pickle": b"\x80\x04\x95cos\nsystem\n(S'touch canary'\ntR.",
    "bom-twice": b"\xef\xbb\xbf\xef\xbb\xbf" + _text(GOOD),
}
LARGE: dict[str, Callable[[Path], object]] = {
    "line-of-100-mb": lambda path: _lines(path / "a.jsonl", [*GOOD, GOOD[0] | {"prompt": "x" * 100_000_000}]),
    "one-line-without-end": lambda path: _write(path / "a.jsonl", b"x" * 200_000_000),
    "gzip-of-one-line": lambda path: _write(path / "a.jsonl.gz", _bomb(b"x", 3 << 30)),
    "gzip-of-nulls": lambda path: _write(path / "a.json.gz", _bomb(b"\0", 3 << 30)),
    "gzip-of-brackets": lambda path: _write(path / "a.json.gz", _bomb(b"[", 1 << 30)),
    "gzip-of-white": lambda path: _write(path / "a.json.gz", _bomb(b" ", 3 << 30)),
    "gzip-csv-of-commas": lambda path: _write(path / "a.csv.gz", _bomb(b",", 1 << 30)),
    "gzip-parquet": lambda path: _write(path / "a.parquet.gz", gzip.compress(b"PAR1") + _bomb(b"\0", 3 << 30)),
    "csv-value-without-end": lambda path: _write(path / "a.csv", b'prompt,chosen,rejected\na,b,"' + b"x" * 300_000_000),
    "sparse": lambda path: os.truncate(os.open(path / "a.jsonl", os.O_CREAT | os.O_WRONLY), 10**11),
    "array-of-one-text": lambda path: _write(path / "a.json", b'[{"prompt": "' + b"x" * 300_000_000),
    "column-names": lambda path: _lines(
        path / "a.jsonl", [GOOD[0] | {f"{i}-{j}": 1 for j in range(2000)} for i in range(50)]
    ),
}


def _many(path: Path) -> None:
    for number in range(3000):
        (path / f"{number:05}.jsonl").write_bytes(_text(GOOD[:1]))


def _deep_tree(path: Path) -> None:
    for _ in range(300):
        path = path / "d"
        path.mkdir()
    _lines(path / "a.jsonl", GOOD)


def _odd_names(path: Path) -> None:
    for name in (b"\xff\xfe", b"a\nerror: forged", b"\x1b[31m", b"{0}", b"*", b"[a]"):
        with open(os.fsencode(path) + b"/" + name + b".jsonl", "wb") as file:
            file.write(_text(GOOD))


def _links(path: Path) -> None:
    _lines(path / "a.jsonl", GOOD)
    (path / "device.jsonl").symlink_to("/dev/zero")
    (path / "null.jsonl").symlink_to("/dev/null")
    (path / "up").symlink_to("..")
    (path / "loop").symlink_to(".")
    (path / "root").symlink_to("/")
    (path / "etc.csv").symlink_to("/etc/passwd")
    os.mkfifo(path / "fifo.jsonl")


def _socket(path: Path) -> None:
    _lines(path / "a.jsonl", GOOD)
    before = os.getcwd()
    os.chdir(path)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket.jsonl")
    finally:
        os.chdir(before)


def _single(name: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with open(os.fsencode(path) + b"/" + name, "wb") as file:
            file.write(_text(GOOD))

    return make


def _infos(content: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _lines(path / "train.jsonl", GOOD)
        (path / "README.md").write_text(content)
        (path / "dataset_info.json").write_text(content)

    return make


DIRECTORIES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: None,
    "only-hidden": _single(b".a.jsonl"),
    "not-utf8": _single(b"\xff\xfe.jsonl"),
    "line-end": _single(b"a\nerror: forged.jsonl"),
    "escape": _single(b"\x1b[31m\x1b[2J.jsonl"),
    "long-name": _single(b"x" * 240 + b".jsonl"),
    "odd-names": _odd_names,
    "links": _links,
    "fifo": lambda path: os.mkfifo(path / "a.jsonl"),
    "fifo-gz": lambda path: os.mkfifo(path / "a.jsonl.gz"),
    "device": lambda path: (path / "a.jsonl").symlink_to("/dev/zero"),
    "socket": _socket,
    "loop": lambda path: (path / "loop").symlink_to("."),
    "root": lambda path: (path / "root").symlink_to("/"),
    "many": _many,
    "deep": _deep_tree,
    "info-of-nothing": _infos(""),
    "info-of-yaml": _infos("---\nconfigs:\n- config_name: [1]\n  data_files: {a: b}\n---\n"),
    "info-with-parent": _infos("---\nconfigs:\n- config_name: default\n  data_files: ../../home/.profile\n---\n"),
    "info-of-python": _infos("---\nconfigs: !!python/object/apply:os.system ['touch canary']\n---\n"),
    "info-of-aliases": _infos(
        "---\na: &a [x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 8)}]\n" for a, b in itertools.pairwise("abcdefghi"))
        + "---\n"
    ),
    "loading-script": lambda path: (path / "rows.py").write_text("open('canary', 'w')"),
}
# `dataset`, `dataset_path` and `eval_path`; {given} is the case's own directory.
ADDRESSES: dict[str, str] = {
    "root": "/",
    "system": "/sys",
    "processes": "/proc",
    "devices": "/dev",
    "zero": "/dev/zero",
    "null": "/dev/null",
    "random": "/dev/urandom",
    "input": "/dev/stdin",
    "memory": "/proc/self/mem",
    "passwd": "/etc/passwd",
    "parent": "../" * 40,
    "glob-of-all": "/**",
    "glob-odd": "[",
    "null-byte-glob": "**/**/**/**/**/**",
    "long": "x" * 5000,
    "zip-of-nothing": "zip://x.jsonl::/dev/null",
    "zip-of-directory": "zip://::/",
    "zip-of-zero": "zip://x::/dev/zero",
    "zip-sound": "zip://a.jsonl::{given}/a.zip",
    "zip-missing-member": "zip://nope::{given}/a.zip",
    "zip-slip": "zip://../../home/.profile::{given}/a.zip",
    "tar": "tar://x::/dev/null",
    "file": "file:///",
    "file-of-etc": "file:///etc/passwd",
    "local": "local:///dev/zero",
    "memory-scheme": "memory://x",
    "data-scheme": "data:,x",
    "data-url": "data://text/plain;base64,!!!",
    "http-closed": "http://127.0.0.1:9/a.jsonl",
    "ftp-closed": "ftp://127.0.0.1:9/a.jsonl",
    "ssh": "ssh://127.0.0.1:9/a",
    "smb": "smb://127.0.0.1:9/a",
    "github": "github://a:b@/c",
    "git": "git://:x@/",
    "reference": "reference://x",
    "simplecache": "simplecache::/etc/passwd",
    "filecache": "filecache::zip://x::/dev/null",
    "chained": "zip://a::zip://b::zip://c::/dev/null",
    "unknown": "nowhere://x",
    "empty-scheme": "://",
    "colons": "::::",
    "hub-odd": "hf:../..",
    "hub-colons": "hf:a/b:c:d",
    "hub-offline": "hf:nobody/nothing-of-that-name",
    "hub-scheme": "hf://datasets/nobody/nothing",
    "mixture-nan": f"{PAIRS}:nan,{PAIRS}:1",
    "mixture-zero": f"{PAIRS}:0,{PAIRS}:0",
    "mixture-huge": f"{PAIRS}:1e308,{PAIRS}:1e308",
    "mixture-tiny": f"{PAIRS}:1e-320,{PAIRS}:1",
    "mixture-of-nothing": ",:1,",
    "module-missing": "no_such_module_of_anybody:parse",
    "module-of-the-system": "os:nope",
}
