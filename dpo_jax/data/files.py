"""Finding data files, here, at an address or on the hub, and telling one content from another."""

import glob
import itertools
import os
import re
from typing import Any

import fsspec

from dpo_jax.disk import digest
from dpo_jax.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_SEPARATED = (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".arrow", ".feather", *_SEPARATED)
# JSON files that published repositories have beside the data.
_NOT_DATA = {
    f"{name}.json" for name in ("config", "manifest", "dataset_dict", "dataset_info", "dataset_infos", "state")
}
_CACHED = re.compile(r"cache-[0-9a-f]+\S*\.arrow")  # what `datasets` computed from the data beside it
_CHUNK = 1 << 20
_WHOLE_HASH_LIMIT = 4 << 30  # bytes; beyond it, the ends, the size and the time of change stand for the content


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
        bare = {one: name.removesuffix(".gz").lower() for one, name in shown.items()}
        listed = [one for one, name in bare.items() if name.endswith(SUFFIXES) and not _CACHED.fullmatch(name)]
        # Tables of numbers lie beside many published files; alone they are the data.
        listed = [one for one in listed if not bare[one].endswith(_SEPARATED)] or listed
    if not listed:
        what = "no such file or directory, and no file matches it as a glob; check the path"
        needed = f"no data files in this directory; needed are {', '.join(SUFFIXES)} (also .gz)"
        raise UserError(f"{path}: {needed if is_directory else what}")
    return sorted(listed)


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


def _list_remote(path: str) -> tuple[bool, list[str]]:
    """Whether the address is a directory, and the files in it, or those that match it."""
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        is_directory = filesystem.isdir(inner)
        listed = filesystem.find(inner) if is_directory else filesystem.glob(inner)
        return is_directory, [filesystem.unstrip_protocol(one) for one in listed]
    except (ImportError, ValueError) as error:
        extra = "; run pip install 'dpo_jax[gcs]'" if path.startswith(("gs://", "gcs://")) else ""
        raise UserError(f"{path}: cannot be opened ({one_line(error)}){extra}") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be reached ({one_line(error)}); check the address and the credentials"
        ) from error
