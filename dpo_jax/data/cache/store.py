"""The cache of tokenised pairs: an ArrayRecord file with random access, small arrays beside it, and a manifest.

A cache directory is `ROOT/KEY`, where KEY is a hash of the fingerprint: of everything that decides its content. It is
written under another name and renamed when whole, so a writer that is killed leaves nothing that is taken for a cache.
One writer at a time holds `ROOT/KEY.lock`; the others wait and then read what it wrote. Every file is compared with its
checksum before a cache is used (0.1 s for 100 MB); a damaged one is made anew, with a line that says so.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source

from dpo_jax.data.cache.lock import cache_lock, warn
from dpo_jax.data.cache.manifest import (
    ARRAYS,
    COMPUTED,
    MANIFEST,
    MARGIN,
    RECORDS,
    OtherFormatError,
    find_damage,
    parse_manifest,
)
from dpo_jax.disk import digest, is_full
from dpo_jax.errors import SAVE_FAILED, UserError

_LEFT_OVER_SECONDS = 3600
_MOST_CACHES = 1000  # that are looked at for one of another version
# Types and numbers of columns of the arrays.
_KINDS = {
    "lengths": (np.int32, 3),
    "source": (np.int32, 0),
    "prompt_hash": (np.uint64, 0),
    "origin": (np.int32, 2),
    "margin": (np.float32, 0),
}


@dataclass(frozen=True)
class PairCache:
    """Tokenised pairs on disk; cheap to open, to pickle (as its directory) and to read from several threads.

    `lengths` int32 [n, 3] (prompt, chosen, rejected, in tokens), `source` int32 [n], `prompt_hash` uint64 [n],
    `origin` int32 [n, 2] (number of the source's file, line), `margin` float32 [n] where pairs have one: memory maps.
    `manifest` is the JSON object that the writer left.
    """

    directory: str
    lengths: np.ndarray
    source: np.ndarray
    prompt_hash: np.ndarray
    origin: np.ndarray
    manifest: dict[str, Any]
    margin: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of pair `index`: prompt, chosen, rejected, int32 each and read-only."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        prompt, chosen, rejected = (int(length) for length in self.lengths[index])
        ids = self._ids(int(index))
        if len(ids) != prompt + chosen + rejected:
            raise self._damaged(f"pair {index} has {len(ids)} tokens, not {prompt + chosen + rejected}")
        return ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]

    def _ids(self, index: int) -> np.ndarray:
        try:
            return np.frombuffer(_reader(self.directory, self.manifest["id"])[index], dtype="<i4")
        except (RuntimeError, ValueError, IndexError, OSError) as error:  # a block has a checksum of its own
            raise self._damaged(f"pair {index}: {error}") from error

    def _damaged(self, what: str) -> UserError:
        """All was sound when it was opened; what makes it anew is the next start, which compares it again."""
        return UserError(
            f"{self.directory}: damaged while it was read ({what:.200}); the same command makes the cache anew and "
            "resumes, but check the disk",
            code=SAVE_FAILED,
        )

    def row(self, index: int) -> dict[str, Any]:
        """Where pair `index` is from: the source's name, its file (where it was when the cache was built), the line."""
        entry = next(e for e in self.manifest["sources"] if e["start"] <= index < e["stop"])
        file, line = (int(number) for number in self.origin[index])
        return {"source": entry["name"], "file": entry["files"][file], "line": line}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.directory,)


def cache_key(fingerprint: dict[str, Any]) -> str:
    """The name of the directory of the cache with this fingerprint."""
    return digest(json.dumps(fingerprint, sort_keys=True, separators=(",", ":")))


def holds(manifest: dict[str, Any], fingerprint: dict[str, Any]) -> bool:
    """Whether a cache with this manifest is the one for `fingerprint`."""
    return cache_key(manifest["fingerprint"]) == cache_key(fingerprint)


def find_or_write(
    root: Path, fingerprint: dict[str, Any], write: Callable[[Path], None], wanted: str = ""
) -> tuple[PairCache, bool]:
    """The cache for `fingerprint` below `root` if it is whole, else what `write` puts there; and whether it did.

    `write` fills an empty directory with the files of a cache; one process at a time calls it. `wanted`: the ID of the
    only build that will do. Of a cache that is damaged or of another version, a line says so.

    UserError if the directory cannot be written (code 74: the disk is full); also whatever `write` raises. Then no
    cache is left.
    """
    key = cache_key(fingerprint)
    target = root / key
    cache, _ = _open_if_whole(target, fingerprint, wanted)
    if cache is not None:
        return cache, False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with cache_lock(root, key):
            cache, why = _open_if_whole(target, fingerprint, wanted)
            if cache is not None:  # made while we waited
                return cache, False
            if why:
                warn(f"cache {target}: {why}; it is made anew")
            elif not wanted and (other := _of_another_version(root, fingerprint)):
                warn(f"cache {other}: another version of this package made it of the same rows; it is made anew")
            _clear_left_overs(root, key)
            building = Path(tempfile.mkdtemp(prefix=f"{key}.building-", dir=root))
            try:
                write(building)
                return _put_in_place(building, target, fingerprint, wanted)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        cache, _ = _open_if_whole(target, fingerprint, wanted)
        if cache is not None:  # another has made it, and cleared away what a frozen process had begun
            return cache, False
        raise unwritable(f"cache_dir={root}", error) from error


def unwritable(what: str, error: OSError) -> UserError:
    """What is said of a cache that cannot be written, with the code for a full disk where that is the reason."""
    reason = error.strerror or error
    if is_full(error):
        return UserError(f"{what}: {reason}; make room, then give the same command again", code=SAVE_FAILED)
    return UserError(f"{what}: cannot be written ({reason}); give a writable --config.cache_dir")


def _put_in_place(building: Path, target: Path, fingerprint: dict[str, Any], wanted: str) -> tuple[PairCache, bool]:
    """Rename what was written to `target`, where a damaged cache or another build may be."""
    for path in building.iterdir():  # on disk before the rename: a machine that dies leaves no hollow cache
        with path.open("rb") as file:
            os.fsync(file.fileno())
    cache, _ = _open_if_whole(target, fingerprint, wanted)
    if cache is not None:  # made by another, where nobody could hold the lock
        return cache, False
    if os.path.lexists(target):
        for path in target.glob(COMPUTED):  # costs more than the pairs
            with contextlib.suppress(OSError):
                path.rename(building / path.name)
        target.rename(target.with_name(f"{target.name}.building-damaged-{uuid.uuid4().hex}"))
    building.rename(target)
    _clear_left_overs(target.parent, f"{target.name}.building-damaged", older_than=0)
    return _open(target, contents=False), True


def _of_another_version(root: Path, fingerprint: dict[str, Any]) -> Path | None:
    """A cache of the same rows, tokenizer and limits that other code made."""
    mine = json.loads(json.dumps(fingerprint))
    same = {key: value for key, value in mine.items() if key != "code"}
    for path in itertools.islice(root.glob(f"*/{MANIFEST}"), _MOST_CACHES):
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            theirs = json.loads(path.read_text()).get("fingerprint", {})
            if theirs != mine and {key: value for key, value in theirs.items() if key != "code"} == same:
                return path.parent
    return None


def open_cache(directory: str) -> PairCache:
    """Opens a whole cache; UserError if it is none, or one of its files is not what was written."""
    try:
        return _open(Path(directory), contents=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory}: no cache of pairs, or a damaged one ({error}); delete it to build it anew"
        ) from None


def find_fault(directory: Path) -> str:
    """Why a directory holds no whole cache; empty if it does."""
    try:
        _open(directory, contents=True)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _reopen(directory: str) -> PairCache:
    """A cache that was compared with its checksums when it was opened first."""
    return _open(Path(directory), contents=False)


def _open(directory: Path, *, contents: bool) -> PairCache:
    """The cache in a directory; `contents`: only if its files are what was written.

    Raises:
      ValueError, OSError: it is none, or a damaged one; OtherFormatError: one of another version.
    """
    manifest = parse_manifest((directory / MANIFEST).read_bytes())
    if why := find_damage(directory, manifest, contents=contents):
        raise ValueError(why)
    arrays = {name: _array(directory, name, manifest["pairs"]) for name in ARRAYS}
    margin = _array(directory, "margin", manifest["pairs"]) if MARGIN in manifest["files"] else None
    return PairCache(str(directory), **arrays, manifest=manifest, margin=margin)


def _array(directory: Path, name: str, pairs: int) -> np.ndarray:
    """A memory map of one of the arrays; ValueError if it is of another type or shape than all are."""
    kind, columns = _KINDS[name]
    try:
        found = np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the head as Python, whose errors are many
        raise ValueError(f"{name}.npy is no array ({type(error).__name__})") from None
    if found.dtype != kind or found.shape != ((pairs, columns) if columns else (pairs,)):
        raise ValueError(f"{name}.npy holds {found.dtype} {list(found.shape)}, which is not of {pairs:,} pairs")
    return found


def _open_if_whole(target: Path, fingerprint: dict[str, Any], wanted: str) -> tuple[PairCache | None, str]:
    """The cache, or why what is there is not used; no reason where nothing is, or another build than the wanted one."""
    if not os.path.lexists(target):
        return None, ""
    try:
        manifest = parse_manifest((target / MANIFEST).read_bytes())  # before all files are hashed for nothing
        if not holds(manifest, fingerprint):
            return None, f"it is damaged (its {MANIFEST} is that of other rows)"
        if wanted not in ("", manifest["id"]):
            return None, ""
        return _open(target, contents=True), ""
    except FileNotFoundError:
        return None, f"it has no {MANIFEST}"
    except OtherFormatError as error:
        return None, str(error)
    except (OSError, ValueError) as error:
        return None, f"it is damaged ({getattr(error, 'strerror', None) or error})"


@functools.lru_cache(maxsize=16)
def _reader(directory: str, identity: str) -> Any:
    """The open record file of this process; `identity` tells a cache that was built anew in the same place."""
    return array_record_data_source.ArrayRecordDataSource(os.path.join(directory, RECORDS))


def _clear_left_overs(root: Path, prefix: str, older_than: float = _LEFT_OVER_SECONDS) -> None:
    """Removes what killed writers left; recent directories stay, where a file system's locks may not hold."""
    for path in root.glob(f"{prefix}*"):
        if ".building-" in path.name and time.time() - path.stat().st_mtime >= older_than:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
