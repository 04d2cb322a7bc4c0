"""Finding data files and reading their rows one by one, so that memory does not grow with the row count.

What a file holds is decided by its first bytes (gzip, Parquet, a JSON array, else JSON lines), not by its name. A line
that is no row is a `BadLine`, which the caller counts; a file that cannot be read to its end is one `UserError`.
"""

import codecs
import glob
import gzip
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from dpo_jax.disk import digest
from dpo_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
# JSON files that published repositories have beside the data.
_NOT_DATA = {
    f"{name}.json" for name in ("config", "manifest", "dataset_dict", "dataset_info", "dataset_infos", "state")
}
_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # what is between the rows of a JSON array
_COUNT_ROWS = 256  # rows after which the position in the file is asked for
_WHOLE_HASH_LIMIT = 4 << 30  # bytes; beyond it, the ends, the size and the time of change stand for the content


@dataclass(frozen=True)
class BadLine:
    """A line that gives no row: `reason` is counted, `text` is what stood there (broken bytes replaced)."""

    reason: str
    text: str


def is_remote(path: str) -> bool:
    """True for `gs://` and every other address that fsspec opens."""
    return "://" in path


def find_files(path: str) -> list[str]:
    """The data files that `path` (a file, a glob, a directory or an fsspec address of these) names, sorted.

    UserError if nothing is there, or the directory holds no data file.
    """
    path = path if is_remote(path) else os.path.expanduser(path)
    if os.path.isfile(path):
        return [path]
    if is_remote(path):
        is_directory, listed = _list_remote(path)
    elif is_directory := os.path.isdir(path):
        listed = [os.path.join(top, name) for top, _, names in os.walk(path) for name in names]
    else:
        listed = [one for one in glob.glob(path, recursive=True) if os.path.isfile(one)]
    if is_directory:
        names = {one: one.rsplit("/", 1)[-1] for one in listed}
        shown = {one: name for one, name in names.items() if not name.startswith(".") and name not in _NOT_DATA}
        listed = [one for one, name in shown.items() if name.removesuffix(".gz").endswith(SUFFIXES)]
    if not listed:
        what = "no such file or directory, and no file matches it as a glob; check the path"
        needed = f"no data files in this directory; needed are {', '.join(SUFFIXES)} (also .gz)"
        raise UserError(f"{path}: {needed if is_directory else what}")
    return sorted(listed)


def read_rows(
    path: str, count: Callable[[int], None] = lambda number: None
) -> Iterator[tuple[str, dict[str, Any] | BadLine]]:
    """Yields (`path:line`, row) for every row of one file; for Parquet the line is the row's number, from 1.

    `count` is told now and then how many bytes more of the file, packed as it is, have been read.

    UserError if the file is missing, empty, truncated or damaged.
    """
    rows = counted = 0
    try:
        with fsspec.open(path, "rb").open() if is_remote(path) else open(path, "rb") as raw:
            stream = io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
            for line, row in _rows_of(stream):
                rows += 1
                yield f"{path}:{line}", row
                if rows % _COUNT_ROWS == 0 and (position := stream.tell()) > counted:  # Parquet is read in leaps
                    count(position - counted)
                    counted = position
            count(max(0, stream.seek(0, io.SEEK_END) - counted))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip data is truncated or damaged after {rows} rows; fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}, after {rows} rows); check the path") from error
    except ValueError as error:  # a JSON array or Parquet file that cannot be read on
        raise UserError(f"{path}: damaged after {rows} rows ({_one_line(error)}); fetch or write it again") from error
    if rows == 0:
        raise UserError(f"{path}: the file is empty; give a file with rows or take it out of the path")


def fingerprint(path: str) -> dict[str, Any]:
    """What tells this file's content from any other: path, bytes, digest (of a remote file: its store's own mark).

    UserError if the file cannot be read.
    """
    try:
        if is_remote(path):
            filesystem, inner = fsspec.core.url_to_fs(path)
            return {"path": path, "bytes": filesystem.size(inner), "digest": str(filesystem.ukey(inner))}
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            pieces = iter(lambda: stream.read(_CHUNK), b"")
            if size > _WHOLE_HASH_LIMIT:
                begin = f"{os.stat(path).st_mtime_ns} ".encode() + stream.read(16 * _CHUNK)
                stream.seek(-16 * _CHUNK, os.SEEK_END)
                pieces = itertools.chain([begin], pieces)
            return {"path": os.path.abspath(path), "bytes": size, "digest": digest(pieces, size=16)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); check the path") from error


def download(repository: str, patterns: list[str]) -> str:
    """The local directory of a hub dataset's files that match `patterns`, downloaded if they are not there yet.

    UserError if the hub or the repository cannot be reached and there is no local copy.
    """
    import huggingface_hub  # here, because it is slow to import and local data needs none of it

    try:
        return huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # httpx, hub and validation errors have no common parent
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"dataset {repository} cannot be fetched from the Hugging Face hub ({reason:.160}); fetch it elsewhere "
            f"(`hf download {repository} --repo-type dataset --local-dir DIR`) and give --config.dataset_path=DIR, or "
            "try --config=configs/hhh.py:tiny, which needs no hub"
        ) from error


def _one_line(error: Exception) -> str:
    """What went wrong without the path (it is named already), the error number and line breaks."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _rows_of(stream: Any) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    magic = stream.read(4)
    stream.seek(0)
    if magic[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=stream) as unpacked:
            reader = io.BufferedReader(unpacked, _CHUNK)
            if reader.peek(4)[:4] == b"PAR1":
                with tempfile.TemporaryFile() as whole:  # read from its end first
                    shutil.copyfileobj(reader, whole, _CHUNK)
                    yield from _parquet_rows(whole)
            else:
                yield from _json_rows(reader)
    else:
        yield from _parquet_rows(stream) if magic == b"PAR1" else _json_rows(stream)


def _json_rows(stream: Any) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """Rows of JSON lines, or of one array if the first character that is no white space is `[`."""
    head = stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    if head.startswith(b"["):
        yield from _array_rows(stream)
        return
    for number, line in enumerate(stream, 1):
        row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if row.strip():
            yield number, _json_row(row)


def _json_row(line: bytes) -> dict[str, Any] | BadLine:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return BadLine("invalid_utf8", line.decode("utf-8", errors="replace").rstrip("\n"))
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, a number of 5,000 digits, brackets 10,000 deep
        return BadLine("invalid_json", text.rstrip("\n"))
    return row if isinstance(row, dict) else BadLine("not_an_object", text.rstrip("\n"))


def _array_rows(stream: Any) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """The elements of a JSON array, decoded from a sliding window.

    Broken UTF-8 becomes lone surrogates, which the row's parser refuses: one bad row, not a lost file.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scan, window, line, ended = json.JSONDecoder().raw_decode, decode(stream.read(_CHUNK)), 1, False
    at, first = window.index("[") + 1, True
    line += window.count("\n", 0, at)
    while True:
        begin = _BETWEEN.match(window, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        commas, here = window.count(",", at, begin), line + window.count("\n", at, begin)
        if window[begin : begin + 1] == "]":
            # Rows after the array would be lost without a word.
            if rest := (window[begin + 1 :] + decode(stream.read(), True)).strip():
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
            # Twice as much each time, so that one very long row costs linear time.
            chunk = stream.read(max(_CHUNK, len(window) - at))
            window, at, ended = window[at:] + decode(chunk, not chunk), 0, not chunk
            continue
        yield here, value if isinstance(value, dict) else BadLine("not_an_object", window[begin:end])
        line, at, first = here + window.count("\n", begin, end), end, False


def _parquet_rows(stream: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet  # slow to import, and most runs read JSON lines

    batches = pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=256)
    return enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _list_remote(path: str) -> tuple[bool, list[str]]:
    """Whether the address is a directory, and the files in it, or those that match it."""
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        is_directory = filesystem.isdir(inner)
        listed = filesystem.find(inner) if is_directory else filesystem.glob(inner)
        return is_directory, [filesystem.unstrip_protocol(one) for one in listed]
    except (ImportError, ValueError) as error:
        extra = "; run pip install 'dpo_jax[gcs]'" if path.startswith(("gs://", "gcs://")) else ""
        raise UserError(f"{path}: cannot be opened ({_one_line(error)}){extra}") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be reached ({_one_line(error)}); check the address and the credentials"
        ) from error
