"""Finding data files, here, at an address or on the hub, and telling one content from another."""

import contextlib
import fnmatch
import glob
import itertools
import logging
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec

from dpo_jax.disk import digest
from dpo_jax.errors import UserError, escaped

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_SEPARATED = (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".arrow", ".feather", *_SEPARATED)
# JSON files that published repositories have beside the data.
_NOT_DATA = {
    f"{name}.json" for name in ("config", "manifest", "dataset_dict", "dataset_info", "dataset_infos", "state")
}
_CACHED = re.compile(r"cache-[0-9a-f]+\S*\.arrow")  # what `datasets` computed from the data beside it
MOST_ENTRIES = 100_000  # files and directories that a search looks at
_SHOWN = 3  # of what a search passed over
_CHUNK = 1 << 20
_WHOLE_HASH_LIMIT = 4 << 30  # bytes; beyond it, the ends, the size and the time of change stand for the content


def is_remote(path: str) -> bool:
    """True for `gs://` and every other address that fsspec opens."""
    return "://" in path


def local_path(path: str) -> str:
    """`file://` and `local://` addresses as the paths that they are, `~` as the home; other addresses as they stand."""
    scheme, mark, rest = path.partition("://")
    if mark and scheme in ("file", "local") and "::" not in rest:
        return rest
    return path if is_remote(path) else os.path.expanduser(path)


@dataclass
class _Search:
    """What a search below `root` has found so far, how many entries it has looked at, and what it passed over."""

    root: str
    files: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    entries: int = 0

    def count(self, number: int = 1) -> None:
        """Stop where the search would not end."""
        self.entries += number
        if self.entries > MOST_ENTRIES:
            raise UserError(
                f"{self.root}: more than {MOST_ENTRIES:,} files and directories are in it; name the directory of the "
                "data itself"
            )

    def words(self) -> str:
        """What was passed over."""
        more = len(self.passed_over) - _SHOWN
        return "; ".join(sorted(self.passed_over)[:_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")


def find_files(path: str, passed_over: list[str] | None = None) -> list[str]:
    """The data files that `path` (a file, a glob, a directory or an fsspec address of these) names, sorted.

    A directory is searched to its last level. Links in it that lead out of it and what is no regular file (pipes,
    devices, sockets) are passed over: `passed_over` gets a line then, or standard error where it is None.

    UserError if nothing is there, or the directory holds no data file or too much to look at; if what `path` names is
    no regular file.
    """
    given, path = path, local_path(path)
    if not is_remote(path) and os.path.isfile(path):
        return [path]
    search = _Search(path)
    if is_remote(path):
        is_directory = _list_remote(search)
    elif is_directory := os.path.isdir(path):
        _walk(search, path)
    elif "**" in path:
        _walk(search, *_around(path))
    else:
        if kind := _kind(path):
            raise UserError(f"{path}: is {kind}, not a file; write its rows to a file, and name that")
        matching = glob.glob(path)
        search.files = [one for one in matching if os.path.isfile(one)]
        search.passed_over = [f"{one} is {kind}" for one in matching if (kind := _kind(one))]
    if is_directory:
        # Tables of numbers lie beside many published files; alone they are the data.
        tables = [one for one in search.files if _bare(one).endswith(_SEPARATED)]
        search.files = sorted({*search.files} - {*tables}) or tables
    over = search.words()
    if not search.files:
        what = "no such file or directory, and no file matches it as a glob; check the path"
        needed = f"no data files in this directory; needed are {', '.join(SUFFIXES)} (also .gz)"
        raise UserError(f"{given}: {needed if is_directory else what}{f' (passed over: {over})' if over else ''}")
    if over:
        line = escaped(f"{given}: passed over: {over}")
        if passed_over is None:
            print(f"warning: {line}", file=sys.stderr)
        else:
            passed_over.append(line)
    return sorted(search.files)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it; whatever a library behind it raises."""
    _refuse_devices(address)
    # It logs every failed request with a traceback, beside the exception that tells the same.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.core.url_to_fs(address)


def _refuse_devices(address: str) -> None:
    """Refuse, with a UserError, an archive that is a pipe or a device: looking for its end would never end."""
    for part in address.split("::")[1:]:
        scheme, mark, rest = part.partition("://")
        place = rest if mark and scheme in ("file", "local") else part
        if (not mark or place is rest) and (kind := _kind(place)):
            raise UserError(f"{address}: {place} is {kind}, not a file; name a file")


@contextlib.contextmanager
def open_data(path: str) -> Iterator[IO[bytes]]:
    """A data file that is open for reading.

    UserError if it is no regular file, or its address cannot be opened or read.

    Raises:
      OSError: a local file cannot be opened.
    """
    if not is_remote(path):
        if kind := _kind(path):
            raise UserError(f"{path}: is {kind}, not a file; write its rows to a file, and name that")
        # Whatever takes its place meanwhile is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            yield file
        return
    _refuse_devices(path)
    try:
        with fsspec.open(path, "rb") as file:
            yield file
    except (OSError, ValueError, EOFError, zlib.error, UserError):  # also of what the bytes hold
        raise
    except Exception as error:  # the classes of every library behind an address
        raise _unreachable(path, error) from error


def fingerprint(path: str) -> dict[str, Any]:
    """What tells this file's content from any other: path, bytes, digest (of a remote file: its store's own mark).

    UserError if the file cannot be read.
    """
    if is_remote(path):
        try:
            filesystem, inner = file_system(path)
            return {"path": path, "bytes": filesystem.size(inner), "digest": str(filesystem.ukey(inner))}
        except Exception as error:  # the classes of every library behind an address
            raise _unreachable(path, error) from error
    try:
        with open_data(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            pieces = iter(lambda: stream.read(_CHUNK), b"")
            if size > _WHOLE_HASH_LIMIT:
                begin = f"{os.stat(path).st_mtime_ns} ".encode() + stream.read(16 * _CHUNK)
                stream.seek(-16 * _CHUNK, os.SEEK_END)
                pieces = itertools.chain([begin], pieces)
            return {"path": os.path.abspath(path), "bytes": size, "digest": digest(pieces, size=16)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); check the path") from error


def download(repository: str, patterns: list[str], revision: str = "") -> str:
    """The local directory of a hub dataset's files that match `patterns`, downloaded if they are not there yet.

    `revision` is a branch, tag or commit; empty: the main branch.

    UserError if the hub or the repository cannot be reached and there is no local copy.
    """
    import huggingface_hub  # here, because it is slow to import and local data needs none of it

    named = f"{repository} at {revision!r}" if revision else repository
    try:
        return huggingface_hub.snapshot_download(
            repository, repo_type="dataset", allow_patterns=patterns, revision=revision or None
        )
    except Exception as error:  # httpx, hub and validation errors have no common parent
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"dataset {named} cannot be fetched from the Hugging Face hub ({reason:.160}); fetch it elsewhere "
            f"(`hf download {repository} --repo-type dataset --local-dir DIR`) and give --config.dataset_path=DIR, or "
            "try --config=configs/hhh.py:tiny, which needs no hub"
        ) from error


def one_line(error: Exception) -> str:
    """What went wrong without the path (it is named already), the error number and line breaks."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _unreachable(path: str, error: Exception) -> UserError:
    """What is said of an address that cannot be opened, whatever library is behind it."""
    reason = f"{type(error).__name__}: {one_line(error)}" if not isinstance(error, OSError) else one_line(error)
    needs_gcs = isinstance(error, ImportError | ValueError) and path.startswith(("gs://", "gcs://"))
    extra = "; run pip install 'dpo_jax[gcs]'" if needs_gcs else "; check the address and the credentials"
    return UserError(f"{path}: cannot be opened ({reason or type(error).__name__}){extra}")


def _list_remote(search: _Search) -> bool:
    """Find the files in the directory at an address, or those that match it; returns whether it is a directory."""
    path = search.root
    inner_address, chained, outer = path.partition("::")  # zip://*.jsonl::gs://bucket/pairs.zip
    try:
        filesystem, inner = file_system(path)
        is_directory = filesystem.isdir(inner)
        found: list[str] = []
        if is_directory:
            for _, directories, files in filesystem.walk(inner, detail=True):
                search.count(len(directories) + len(files))
                found += [info["name"] for info in files.values() if info.get("type", "file") == "file"]
            found = [one for one in found if _is_data(one)]
        else:
            matching = filesystem.glob(inner, detail=True)
            found = [name for name, info in matching.items() if info.get("type", "file") == "file"]
        scheme = inner_address.partition("://")[0]
        search.files = [
            f"{scheme}://{one.lstrip('/')}{chained}{outer}" if chained else filesystem.unstrip_protocol(one)
            for one in found
        ]
    except UserError:
        raise
    except Exception as error:  # the classes of every library behind an address
        raise _unreachable(path, error) from error
    return is_directory


def _walk(search: _Search, top: str, pattern: Sequence[str] = ()) -> None:
    """Find the data files in a directory and below, or every file whose path below it matches the pattern's parts."""
    trees, waiting = _trees(top), [top]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    search.count()
                    inside = os.path.relpath(entry.path, top)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif _matches(inside.split(os.sep), pattern) if pattern else _is_data(entry.name):
                        if why := _objection(entry.path, trees):
                            search.passed_over.append(f"{inside} {why}")
                        else:
                            search.files.append(entry.path)
                    elif entry.is_symlink() and os.path.isdir(entry.path) and not _is_in(entry.path, trees):
                        search.passed_over.append(f"{inside} leads out of the directory")
        except OSError as error:
            search.passed_over.append(f"{os.path.relpath(directory, top)} cannot be read ({one_line(error)})")
    owners: dict[str, str] = {}
    for path in sorted(search.files, key=os.path.islink):  # a file before the links to it
        if (first := owners.setdefault(os.path.realpath(path), path)) != path:
            search.passed_over.append(f"{os.path.relpath(path, top)} is {os.path.relpath(first, top)} once more")
    search.files = list(owners.values())


def _objection(path: str, trees: Sequence[str]) -> str:
    """Why a search does not take what is called like a data file; empty for a regular file of one of the trees."""
    if kind := _kind(path):
        return f"is {kind}"
    if os.path.isdir(path):
        return "leads to a directory"
    if not os.path.isfile(path):
        return "leads nowhere"
    return "leads out of the directory" if os.path.islink(path) and not _is_in(path, trees) else ""


def _trees(top: str) -> list[str]:
    """The directories that a search of `top` may read from: itself, and the store of a snapshot of the hub's cache."""
    real = Path(os.path.realpath(top))
    stores = [one.parent / "blobs" for one in (real, *real.parents) if one.name == "snapshots"]
    return [os.path.join(one, "") for one in (real, *(store for store in stores if store.is_dir()))]


def is_inside(path: str, directory: str) -> bool:
    """Whether a path, whatever links are in it, leads to something in the directory."""
    return _is_in(path, _trees(directory))


def _is_in(path: str, trees: Sequence[str]) -> bool:
    return os.path.join(os.path.realpath(path), "").startswith(tuple(trees))


def _around(pattern: str) -> tuple[str, list[str]]:
    """The directory in which a glob has its first wildcard, and the parts of the pattern below it."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    top = "/".join(parts[:first])
    return (top or "/") if first else ".", [part for part in parts[first:] if part]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**" and len(pattern) > 1:
        below = _matches(parts[1:], pattern) if parts and not parts[0].startswith(".") else False
        return below or _matches(parts, pattern[1:])
    if pattern[0] == "**":
        return bool(parts) and not any(part.startswith(".") for part in parts)
    if not parts or parts[0].startswith(".") > pattern[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _bare(path: str) -> str:
    """The name that tells what a file is."""
    return path.partition("::")[0].rsplit("/", 1)[-1].removesuffix(".gz").lower()


def _is_data(path: str) -> bool:
    name, bare = path.rsplit("/", 1)[-1], _bare(path)
    if name.startswith(".") or name in _NOT_DATA:
        return False
    return bare.endswith(SUFFIXES) and not _CACHED.fullmatch(bare)


def _kind(path: str) -> str:
    """What a path names, if that is neither a regular file nor a directory; empty also where nothing is."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a disk"),
    )
    return next((words for is_one, words in kinds if is_one(mode)), "")
