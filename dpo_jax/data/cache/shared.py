"""A cache that machines share, at any address fsspec knows (gs://bucket/dir, s3://...): built once, copied by all.

    ADDRESS/KEY/ID/...          the files of one build, in a directory of its own: two builders never mix theirs
    ADDRESS/KEY/manifest.json   created last, by one builder only: the ID, and size and checksum of every file

A machine that finds no manifest, or one whose files are not all there or not what was written, builds. It takes no
other files from there than those of a cache, whatever the manifest names. There is no lock: machines that build at the
same time do the work twice at worst, and all but the first to create the manifest discard their own build.

ArrayRecord reads files, so every machine has a copy below its local cache root under the same KEY. It is used if its ID
is the shared one's, which every run looks up once: so all machines of a run read the very same build.
"""

import contextlib
import functools
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from dpo_jax.bucket.local import cache_root
from dpo_jax.data.cache.lock import cache_lock, warn
from dpo_jax.data.cache.manifest import MANIFEST, parse_manifest
from dpo_jax.data.cache.store import PairCache, cache_key, find_fault, find_or_write, holds, unwritable
from dpo_jax.data.cache.write import Produce, write_pairs
from dpo_jax.data.files import file_system
from dpo_jax.disk import is_full, whole_file, write_json
from dpo_jax.errors import UserError

# Where directories come into being with their files; makedirs would create a bucket for a misspelt name.
_BUCKETS = {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss"}


@dataclass(frozen=True)
class _Store:
    """fsspec's file system, a directory's path in it, and the address for messages."""

    filesystem: Any
    path: str
    address: str

    def ask(self, operation: str, *args: Any, answers: tuple[type[Exception], ...] = (), **options: Any) -> Any:
        """One call of the file system; `answers` are exceptions that tell something, every other one is a UserError."""
        try:
            return getattr(self.filesystem, operation)(*args, **options)
        except answers:
            raise
        except Exception as error:  # OSError, and each cloud library's own classes
            if isinstance(error, OSError) and is_full(error):
                raise unwritable(f"cache_dir={self.address}", error) from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"cache_dir={self.address}: cannot be reached or written ({reason[:200]}); check the address, the "
                "network and the credentials, or give a local --config.cache_dir"
            ) from error

    def manifest(self) -> bytes | None:
        """The manifest as it is stored; None if there is none."""
        try:
            return self.ask("cat_file", f"{self.path}/{MANIFEST}", answers=(FileNotFoundError,))
        except FileNotFoundError:
            return None


def shared_address(cache_dir: str = "") -> str:
    """The address that `cache_dir` (else $DPO_JAX_CACHE) names; empty if it names a local directory."""
    chosen = cache_dir or os.environ.get("DPO_JAX_CACHE", "")
    return chosen.rstrip("/") if "://" in chosen else ""


def open_or_build(cache_dir: str, fingerprint: dict[str, Any], produce: Produce) -> tuple[PairCache, bool]:
    """The cache for `fingerprint` in `cache_dir` (a directory or an address), and whether anything was written to it.

    UserError if the directory or the address cannot be read or written; also whatever `produce` raises.
    """
    address, root = shared_address(cache_dir), cache_root(cache_dir)
    build = functools.partial(write_pairs, fingerprint=fingerprint, produce=produce)
    if not address:
        return find_or_write(root, fingerprint, build)
    try:
        filesystem, inner = file_system(address)
    except Exception as error:  # a missing library, an unknown protocol, credentials: no common class
        raise UserError(f"cache_dir={address}: {error}; for gs:// run pip install 'dpo_jax[gcs]'") from error
    store = _Store(filesystem, f"{inner.rstrip('/')}/{cache_key(fingerprint)}", address)
    manifest, why = _whole(store, fingerprint)
    if manifest is not None:
        try:
            return _copied(store, root, fingerprint, manifest), False
        except _DamagedUploadError as error:
            why = f"it {error}"
    return _build_and_share(store, root, fingerprint, build, why)


def _build_and_share(
    store: _Store, root: Path, fingerprint: dict[str, Any], build: Callable[[Path], None], why: str
) -> tuple[PairCache, bool]:
    """Make the cache here, and share it unless another was quicker; `why` the one that is there is of no use, if so."""
    if why:
        warn(f"cache {store.address}/{cache_key(fingerprint)}: {why}; it is made anew")
    _make_directory(store, store.path)
    probe = f"{store.path}/{uuid.uuid4().hex}"
    store.ask("pipe_file", probe, b"")  # before an hour of work
    with contextlib.suppress(FileNotFoundError):  # another builder has finished and cleared up
        store.ask("rm", probe, answers=(FileNotFoundError,))
    damaged = store.manifest() if why else None
    built, _ = find_or_write(root, fingerprint, build)
    try:
        # Or two processes of a machine would write the same files of the same build at once.
        with cache_lock(root, cache_key(fingerprint)):
            if damaged is not None and store.manifest() == damaged:
                store.ask("rm", f"{store.path}/{MANIFEST}")
            manifest = _whole(store, fingerprint)[0] or _publish(store, built, fingerprint)
    except OSError as error:
        raise unwritable(f"cache_dir={root}", error) from error
    try:
        return _copied(store, root, fingerprint, manifest), manifest["id"] == built.manifest["id"]
    except _DamagedUploadError as error:
        raise UserError(f"cache_dir={store.address}: what was just written there {error}; check the store") from None


class _DamagedUploadError(Exception):
    """What was copied is not what the manifest says."""


def _copied(store: _Store, root: Path, fingerprint: dict[str, Any], manifest: dict[str, Any]) -> PairCache:
    """This machine's copy of the build that is shared."""

    def copy(directory: Path) -> None:
        for name in manifest["files"]:
            store.ask("get_file", f"{store.path}/{manifest['id']}/{name}", str(directory / name))
        write_json(directory / MANIFEST, manifest)
        if why := find_fault(directory):
            raise _DamagedUploadError(f"is damaged ({why})")

    return find_or_write(root, fingerprint, copy, manifest["id"])[0]


def _whole(store: _Store, fingerprint: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The manifest, if it is this cache's and all files that it names are there and as long as they were written.

    Else why not; no reason where there is no cache.
    """
    if (content := store.manifest()) is None:
        return None, ""
    try:
        manifest = parse_manifest(content)
    except ValueError as error:
        return None, str(error)
    if not holds(manifest, fingerprint):
        return None, f"its {MANIFEST} is that of other rows"
    store.ask("invalidate_cache")  # of listings: another machine may have written since
    for name, wanted in manifest["files"].items():
        try:
            size = store.ask("size", f"{store.path}/{manifest['id']}/{name}", answers=(FileNotFoundError,))
        except FileNotFoundError:
            return None, f"it is damaged ({name} is missing)"
        if size != wanted["bytes"]:
            return None, f"it is damaged ({name} has {size:,} bytes, {wanted['bytes']:,} were written)"
    return manifest, ""


def _publish(store: _Store, cache: PairCache, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Upload a local cache's files, the manifest last; returns the manifest that counts, of this build or another's."""
    damaged, directory = store.manifest(), f"{store.path}/{cache.manifest['id']}"
    _make_directory(store, directory)
    try:
        for name in cache.manifest["files"]:
            store.ask("put_file", str(Path(cache.directory) / name), f"{directory}/{name}")
    except UserError:
        if (shared := _whole(store, fingerprint)[0]) is not None:  # another was quicker, and cleared ours away
            return shared
        raise
    if (shared := _whole(store, fingerprint)[0]) is None:
        if damaged is not None and store.manifest() == damaged:
            store.ask("rm", f"{store.path}/{MANIFEST}")
        _create_manifest(store, cache.manifest)
        shared = _whole(store, fingerprint)[0]
    if shared is None:
        raise UserError(f"cache_dir={store.address}: what was just written is not there; is it being deleted?")
    with contextlib.suppress(Exception):  # what killed builders left, and ours if another was first, harms no run
        for path in store.filesystem.ls(store.path, detail=False):
            if path.rstrip("/").rsplit("/", 1)[-1] not in (MANIFEST, shared["id"]):
                store.filesystem.rm(path, recursive=True)
    return shared


def _make_directory(store: _Store, path: str) -> None:
    if store.address.partition("://")[0] not in _BUCKETS:
        store.ask("makedirs", path, exist_ok=True)


def _create_manifest(store: _Store, manifest: dict[str, Any]) -> None:
    """Write the manifest unless there is one: of several builders at once only one does."""
    path, content = f"{store.path}/{MANIFEST}", json.dumps(manifest, indent=1).encode()
    # FileNotFoundError: of the file before it gets its name; another builder has finished and cleared up.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        if isinstance(store.filesystem, LocalFileSystem):  # its pipe_file looks first and then writes: two could
            with whole_file(Path(path), exclusive=True) as file:
                file.write(content)
        else:
            store.ask("pipe_file", path, content, mode="create", answers=(FileExistsError,))
