"""Reading the rows of a file one by one, so that memory does not grow with the row count.

What a file holds is decided by its first bytes, not by its name: gzip, Parquet, Arrow, Feather, UTF-16, JSON. Only
comma- and tab-separated values have no mark of their own: their names count, and what stands there must agree. A line
that is no row is a `BadLine`, which the caller counts; a file that cannot be read to its end is one `UserError`.
"""

import codecs
import csv
import gzip
import io
import itertools
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from dpo_jax.data.files import JSON_SUFFIXES, one_line, open_data
from dpo_jax.data.json_rows import CHUNK, Numbered, bounded_lines, json_rows
from dpo_jax.data.raw import LONGEST_ROW, TOO_LONG, BadLine, ColumnarRow, NotRowsError, size_of
from dpo_jax.errors import UserError

_COUNT_ROWS = 256  # rows after which the position in the file is asked for
_MAGIC = 8  # bytes that tell what a file is
# Files that are none of ours, and what to do with them.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save it as CSV"),
    (b"\x28\xb5\x2f\xfd", "packed with zstandard; unpack it (zstd -d)"),
    (b"BZh", "packed with bzip2; unpack it (bunzip2)"),
    (b"\xfd7zXZ", "packed with xz; unpack it (unxz)"),
    (b"SQLite", "an SQLite database; export its rows as JSON lines or CSV"),
    (b"\x80\x04", "a Python pickle, which is not opened; write its rows as JSON lines"),
    (b"version https://git-lfs"[:_MAGIC], "a pointer of Git LFS, not the file itself; fetch it (git lfs pull)"),
    (b"<!DOCTYP", "a web page; download the file itself"),
)
_TEXTS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEADER_NAME = re.compile(r"[\w][\w .:-]{0,60}")
_OLD_LINE_END = re.compile(r"(?<=\r)(?!\n)")
_HEADER_WORDS = {"prompt", "chosen", "rejected", "question", "instruction", "messages", "completion", "response_a"}


def read_rows(
    path: str, count: Callable[[int], None] = lambda number: None
) -> Iterator[tuple[str, dict[str, Any] | BadLine]]:
    """Yields (`path:line`, row) for every row of one file; where there are no lines it is the row's number, from 1.

    `count` is told now and then how many bytes more of the file, packed as it is, have been read.

    UserError if the file is missing, empty, truncated or damaged, or holds something else than rows.
    """
    rows = counted = 0
    try:
        with open_data(path) as raw:
            stream = io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
            for line, row in _rows_of(stream, path):
                rows += 1
                yield f"{path}:{line}", row
                if rows % _COUNT_ROWS == 0 and (position := stream.tell()) > counted:  # Parquet is read in leaps
                    count(position - counted)
                    counted = position
            count(max(0, stream.seek(0, io.SEEK_END) - counted))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the gzip data is truncated or damaged after {rows} rows; fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}, after {rows} rows); check the path") from error
    except NotRowsError as error:
        raise UserError(f"{path}: {error}") from error
    except ValueError as error:  # a JSON array or columnar file that cannot be read on
        raise UserError(f"{path}: damaged after {rows} rows ({one_line(error)}); fetch or write it again") from error
    if rows == 0:
        raise UserError(f"{path}: the file is empty; give a file with rows or take it out of the path")


def _rows_of(stream: Any, path: str) -> Iterator[Numbered]:
    packed = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    if not packed:
        yield from _unpacked_rows(stream, path)
        return
    with gzip.GzipFile(fileobj=stream) as unpacked:
        yield from _unpacked_rows(io.BufferedReader(unpacked, CHUNK), path.removesuffix(".gz"), packed=True)


def _unpacked_rows(stream: Any, path: str, packed: bool = False) -> Iterator[Numbered]:
    magic = stream.read(_MAGIC)
    stream.seek(0)
    if (columnar := _columnar(magic)) is not None:
        with tempfile.TemporaryFile() as whole:  # a columnar file is read from its end first
            if packed:
                shutil.copyfileobj(stream, whole, CHUNK)
                whole.seek(0)
            try:
                yield from columnar(whole if packed else stream)
            except (OSError, ValueError):
                raise
            except Exception as error:  # pyarrow's own classes, for what a file says of itself
                raise ValueError(f"{type(error).__name__}: {error}") from error
        return
    if what := next((what for mark, what in _FOREIGN if magic.startswith(mark)), ""):
        raise NotRowsError(what)
    if encoding := _encoding(magic):
        with tempfile.TemporaryFile() as whole:
            # Half a character stays one, and costs its line only.
            decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")
            while chunk := stream.read(CHUNK):
                whole.write(decoder.decode(chunk).encode("utf-8", "surrogatepass"))
            whole.write(decoder.decode(b"", True).encode("utf-8", "surrogatepass"))
            whole.seek(0)
            yield from _text_rows(whole, path)
        return
    yield from _text_rows(stream, path)


def _columnar(magic: bytes) -> Callable[[Any], Iterator[Numbered]] | None:
    for mark, read in ((b"PAR1", _parquet_rows), (b"ARROW1", _arrow_rows), (b"FEA1", _feather_rows)):
        if magic.startswith(mark):
            return read
    return _stream_rows if magic.startswith(b"\xff\xff\xff\xff") and len(magic) == _MAGIC else None


def _encoding(magic: bytes) -> str:
    """The encoding of a text that is not UTF-8, by its mark or by its first character, which is ASCII."""
    for mark, name in _TEXTS:
        if magic.startswith(mark):
            return name
    if len(magic) > 3 and magic[1::2] == b"\0" * len(magic[1::2]) and magic[0]:
        return "utf-16-le"
    return "utf-16-be" if len(magic) > 3 and magic[::2] == b"\0" * len(magic[::2]) and magic[1] else ""


def _text_rows(stream: Any, path: str) -> Iterator[Numbered]:
    head = stream.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    delimiter = _delimiter(head, path)
    return _separated_rows(stream, delimiter) if delimiter else json_rows(stream)


def _delimiter(head: bytes, path: str) -> str:
    """What separates the values of a CSV or TSV file; empty for JSON.

    NotRowsError if the file is called JSON and holds such values.
    """
    if head[:1] in (b"{", b"[", b""):
        return ""
    header = head.partition(b"\n")[0].decode("utf-8", "replace").strip()
    if path.lower().endswith(".tsv"):
        return "\t"
    by_content = max(",\t;", key=header.count)
    if path.lower().endswith(".csv"):
        return by_content if by_content in header else ","
    names = [name.strip().strip('"') for name in header.split(by_content)]
    if len(names) < 2 or not _HEADER_WORDS & set(names) or not all(map(_HEADER_NAME.fullmatch, names)):
        return ""
    if path.lower().endswith(JSON_SUFFIXES):
        raise NotRowsError(
            f"values with {by_content!r} between them, not JSON; call it .{'tsv' if by_content == chr(9) else 'csv'}"
        )
    return by_content


def _separated_rows(stream: Any, delimiter: str) -> Iterator[Numbered]:
    """Rows of comma- or tab-separated values under a line of names; a quoted value may hold line ends.

    Broken UTF-8 becomes lone surrogates, which the row's parser refuses: one bad row, not a lost file.
    """
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(_separated_lines(stream), delimiter=delimiter, strict=True)
    names = [name.strip() for name in next(reader, [])]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise NotRowsError(f"two columns are called {twice[0]!r:.100}; rename one")
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise ValueError(f"line {line}: a quoted value does not end") from error
            if "field limit" in str(error):  # as if a quoted value did not end
                raise NotRowsError(f"line {line}: a value {TOO_LONG}; is a quotation mark missing?") from error
            yield line, BadLine("invalid_csv", f"{error}")
            continue
        if len(values) == len(names):
            yield line, dict(zip(names, values, strict=True))
        elif values:
            yield line, BadLine("invalid_csv", f"{len(values)} values for {len(names)} columns: {values[:3]!r:.200}")


def _separated_lines(stream: Any) -> Iterator[str]:
    """Lines with their ends, which may be those of any system."""
    for number, line in enumerate(bounded_lines(stream), 1):
        if line is None:  # nobody can tell where the value that it is part of ends
            raise NotRowsError(f"line {number} {TOO_LONG}; shorten it, or take it out")
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8", "surrogateescape")
        yield from filter(None, _OLD_LINE_END.split(text)) if "\r" in text else (text,)


def _parquet_rows(stream: Any) -> Iterator[Numbered]:
    import pyarrow.parquet  # slow to import, and most runs read JSON lines

    return _batch_rows(pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_COUNT_ROWS))


def _arrow_rows(stream: Any) -> Iterator[Numbered]:
    """An Arrow file, which Feather is, too."""
    import pyarrow.ipc

    file = pyarrow.ipc.open_file(stream)
    return _batch_rows(file.get_batch(number) for number in range(file.num_record_batches))


def _stream_rows(stream: Any) -> Iterator[Numbered]:
    """A stream of Arrow's, as `datasets` keeps in its cache and in saved directories."""
    import pyarrow.ipc

    return _batch_rows(iter(pyarrow.ipc.open_stream(stream)))


def _feather_rows(stream: Any) -> Iterator[Numbered]:
    """A Feather file of the first version."""
    import pyarrow.feather

    return _batch_rows(pyarrow.feather.read_table(stream).to_batches(max_chunksize=_COUNT_ROWS))


def _batch_rows(batches: Any) -> Iterator[Numbered]:
    """The rows of record batches, converted a few at a time; where these are large, one at a time."""
    pieces = (batch.slice(start, _COUNT_ROWS) for batch in batches for start in range(0, batch.num_rows, _COUNT_ROWS))
    rows = itertools.chain.from_iterable(_piece_rows(piece) for piece in pieces)
    return enumerate(rows, 1)


def _piece_rows(piece: Any) -> Iterator[dict[str, Any] | BadLine]:
    if piece.nbytes <= LONGEST_ROW:
        yield from map(ColumnarRow, piece.to_pylist())
        return
    for number in range(piece.num_rows):
        (row,) = piece.slice(number, 1).to_pylist()
        yield ColumnarRow(row) if size_of(row) <= LONGEST_ROW else BadLine("oversized", f"this row {TOO_LONG}")
