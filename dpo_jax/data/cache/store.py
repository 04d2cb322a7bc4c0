"""The cache of tokenised pairs: an ArrayRecord file with random access, small arrays beside it, and a manifest.

A cache directory is `ROOT/KEY`, where KEY is a hash of the fingerprint: of everything that decides its content. It is
written under another name and renamed when whole, so a writer that is killed leaves nothing that is taken for a cache.
One writer at a time holds `ROOT/KEY.lock`, which the system frees when its process ends; the others wait and then read
what it wrote.
"""

import array
import contextlib
import fcntl
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from dpo_jax.disk import digest
from dpo_jax.errors import UserError

FORMAT = 2  # raise it when the files below change; older caches are then built anew
QUARANTINE, MANIFEST = "quarantine.jsonl", "manifest.json"
LARGEST_ID = "largest_id"  # of the token ids of all pairs, in the manifest
IDS_DIGEST = "ids"  # of the token ids of all pairs, in the manifest
_RECORDS, _MARGIN = "pairs.array_record", "margin.npy"
_LEFT_OVER_SECONDS = 3600
_PLAIN = re.compile(r"\w[\w.-]*")  # a file's name: no directory, and nothing hidden


class Pair(NamedTuple):
    """One pair on its way into the cache: token ids, its source's number, the hash of its prompt (64 bits), its row.

    The row is `line` (from 1) of the source's file number `file`. All pairs of a cache have a margin, or none has.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    source: int
    prompt_hash: int
    file: int = 0
    line: int = 0
    margin: float | None = None


# Given the path for quarantined rows, yields the pairs and returns what the manifest keeps about them.
Produce = Callable[[Path], Generator[Pair, None, dict[str, Any]]]


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
        ids = np.frombuffer(_reader(self.directory, self.manifest["id"])[int(index)], dtype="<i4")
        prompt, chosen, _ = (int(length) for length in self.lengths[index])
        return ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]

    def row(self, index: int) -> dict[str, Any]:
        """Where pair `index` is from: the source's name, its file (where it was when the cache was built), the line."""
        entry = next(e for e in self.manifest["sources"] if e["start"] <= index < e["stop"])
        file, line = (int(number) for number in self.origin[index])
        return {"source": entry["name"], "file": entry["files"][file], "line": line}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.directory,)


def cache_root(cache_dir: str = "") -> Path:
    """The local directory of all caches: `cache_dir`, else $DPO_JAX_CACHE, else ~/.cache/dpo_jax.

    An address such as gs://bucket/dir is passed over: it names a shared cache, of which this directory has copies.
    """
    named = (cache_dir, os.environ.get("DPO_JAX_CACHE", ""))
    return Path(next((path for path in named if path and "://" not in path), "~/.cache/dpo_jax")).expanduser()


def cache_key(fingerprint: dict[str, Any]) -> str:
    """The name of the directory of the cache with this fingerprint."""
    return digest(json.dumps(fingerprint, sort_keys=True, separators=(",", ":")))


def file_sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """The size of every file of a cache with this manifest, by name.

    Raises:
      ValueError, KeyError, TypeError: this is no manifest, or it names a file that is elsewhere.
    """
    if not isinstance(manifest["bytes"], dict) or not all(map(_PLAIN.fullmatch, (manifest["id"], *manifest["bytes"]))):
        raise ValueError("the manifest names what is no plain file name")
    return manifest["bytes"]


def holds(manifest: dict[str, Any], fingerprint: dict[str, Any]) -> bool:
    """Whether a cache with this manifest is the one for `fingerprint`."""
    return manifest.get("format") == FORMAT and cache_key(manifest.get("fingerprint", {})) == cache_key(fingerprint)


def find_or_write(
    root: Path, fingerprint: dict[str, Any], write: Callable[[Path], None], wanted: str = ""
) -> tuple[PairCache, bool]:
    """The cache for `fingerprint` below `root` if it is whole, else what `write` puts there; and whether it did.

    `write` fills an empty directory with the files of a cache; one process at a time calls it. `wanted`: the ID of the
    only build that will do.

    UserError if the directory cannot be written; also whatever `write` raises. Then no cache is left.
    """
    key = cache_key(fingerprint)
    target = root / key
    if (cache := _open_if_whole(target, fingerprint, wanted)) is not None:
        return cache, False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with cache_lock(root, key):
            if (cache := _open_if_whole(target, fingerprint, wanted)) is not None:  # built while we waited
                return cache, False
            _clear_left_overs(root, key)
            building = Path(tempfile.mkdtemp(prefix=f"{key}.building-", dir=root))
            try:
                write(building)
                for path in building.iterdir():  # on disk before the rename: a machine that dies leaves no hollow cache
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                if target.exists():  # damaged or not the wanted one, or we would have returned it
                    target.rename(root / f"{key}.building-damaged-{uuid.uuid4().hex}")
                building.rename(target)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            _clear_left_overs(root, f"{key}.building-damaged", older_than=0)
    except OSError as error:
        raise _unwritable(root, error) from error
    return open_cache(str(target)), True


def _unwritable(root: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cache_dir={root}: cannot be written ({reason}); give a writable --config.cache_dir")


@contextlib.contextmanager
def cache_lock(root: Path, key: str) -> Iterator[None]:
    """Only one process of this machine at a time is in here for one cache; others wait.

    Raises:
      UserError: there can be no lock in `root`.
    """
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context(open(root / f"{key}.lock", "a"))
        except OSError as error:
            raise _unwritable(root, error) from error
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if we are killed
        yield


def open_cache(directory: str) -> PairCache:
    """Opens a whole cache; UserError if it is none, or one of its files is not as long as it was written."""
    path = Path(directory)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        names = ("lengths", "source", "prompt_hash", "origin")
        lengths, source, prompt_hash, origin = (np.load(path / f"{name}.npy", mmap_mode="r") for name in names)
        margin = np.load(path / _MARGIN, mmap_mode="r") if _MARGIN in file_sizes(manifest) else None
        sizes = {name: (path / name).stat().st_size for name in file_sizes(manifest)}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: no cache of pairs, or a damaged one ({error}); delete it to build it anew"
        ) from error
    if manifest["format"] != FORMAT or sizes != manifest["bytes"]:
        raise UserError(f"{directory}: a cache of another version, or a damaged one; delete it to build it anew")
    return PairCache(directory, lengths, source, prompt_hash, origin, manifest, margin)


def _open_if_whole(target: Path, fingerprint: dict[str, Any], wanted: str) -> PairCache | None:
    try:
        cache = open_cache(str(target))
    except UserError:
        return None
    return cache if holds(cache.manifest, fingerprint) and wanted in ("", cache.manifest["id"]) else None


def write_pairs(directory: Path, fingerprint: dict[str, Any], produce: Produce) -> None:
    """Writes all files of a cache; the arrays cost 32 bytes of memory a pair, the records none."""
    lengths, sources, hashes, origins = (array.array(code) for code in "iiQi")
    margins = array.array("f")
    # One record per group: the pipeline reads pairs in random order.
    writer = array_record_module.ArrayRecordWriter(str(directory / _RECORDS), "group_size:1")
    about: dict[str, Any] = {}
    largest, all_ids = -1, hashlib.blake2b(digest_size=12)

    def pairs() -> Iterator[Pair]:
        about.update((yield from produce(directory / QUARANTINE)))

    try:
        with _collecting_new_objects():
            for pair in pairs():
                ids = np.asarray([*pair.prompt, *pair.chosen, *pair.rejected], dtype="<i4")
                largest = max(largest, int(ids.max(initial=-1)))
                record = ids.tobytes()
                all_ids.update(record)
                writer.write(record)
                lengths.extend((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
                sources.append(pair.source)
                hashes.append(pair.prompt_hash)
                origins.extend((pair.file, pair.line))
                if pair.margin is not None:
                    margins.append(pair.margin)
    finally:
        writer.close()
    np.save(directory / "lengths.npy", np.asarray(lengths, dtype=np.int32).reshape(-1, 3))
    np.save(directory / "source.npy", np.asarray(sources, dtype=np.int32))
    np.save(directory / "prompt_hash.npy", np.asarray(hashes, dtype=np.uint64))
    np.save(directory / "origin.npy", np.asarray(origins, dtype=np.int32).reshape(-1, 2))
    if margins:
        assert len(margins) == len(sources), "some pairs have a margin, and others have none"
        np.save(directory / _MARGIN, np.asarray(margins, dtype=np.float32))
    manifest = {
        "format": FORMAT,
        "id": uuid.uuid4().hex,
        "fingerprint": fingerprint,
        "pairs": len(sources),
        LARGEST_ID: largest,
        IDS_DIGEST: all_ids.hexdigest(),
        "bytes": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
        **about,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


@contextlib.contextmanager
def _collecting_new_objects() -> Iterator[None]:
    """Within it the garbage collector looks at new objects only.

    Rows are many small objects that come and go. They would make it look again and again at everything that the process
    has loaded before, which takes a fifteenth of the time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@functools.lru_cache(maxsize=16)
def _reader(directory: str, identity: str) -> Any:
    """The open record file of this process; `identity` tells a cache that was built anew in the same place."""
    return array_record_data_source.ArrayRecordDataSource(os.path.join(directory, _RECORDS))


def _clear_left_overs(root: Path, prefix: str, older_than: float = _LEFT_OVER_SECONDS) -> None:
    """Removes what killed writers left; recent directories stay, where a file system's locks may not hold."""
    for path in root.glob(f"{prefix}*"):
        if ".building-" in path.name and time.time() - path.stat().st_mtime >= older_than:
            shutil.rmtree(path, ignore_errors=True)
