"""A cache that machines share, at any address fsspec knows (gs://bucket/dir, s3://...): built once, copied by all.

    ADDRESS/KEY/manifest.json   written last: without it nothing here is taken for a cache; it names ID and all sizes
    ADDRESS/KEY/ID/...          the files of one build, under a name of its own: two writers never mix theirs
    ADDRESS/KEY/lock.json       the builder's name and the time (see `shared_store`)

ArrayRecord reads files, so every machine has a copy below its local cache root under the same KEY. It is used if its ID
is the shared one's, for which every run asks once: so all machines of a run read the very same build.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from dpo_jax.data.cache import lock as shared_store
from dpo_jax.data.cache.lock import LOCK, Store, ask
from dpo_jax.data.cache.store import MANIFEST, PairCache, Produce, cache_key, cache_root, find_or_build, holds, install
from dpo_jax.errors import UserError


def shared_address(cache_dir: str = "") -> str:
    """The address that `cache_dir` (else $DPO_JAX_CACHE) names; empty if it names a local directory."""
    chosen = cache_dir or os.environ.get("DPO_JAX_CACHE", "")
    return chosen.rstrip("/") if "://" in chosen else ""


def open_or_build(cache_dir: str, fingerprint: dict[str, Any], produce: Produce) -> tuple[PairCache, bool]:
    """The cache for `fingerprint` in `cache_dir` (a directory or an address), and whether anything was written to it.

    Raises:
      UserError: the directory or the address cannot be read or written, or whatever `produce` raises.
    """
    address, root, key = shared_address(cache_dir), cache_root(cache_dir), cache_key(fingerprint)
    if not address:
        return find_or_build(root, fingerprint, produce)
    store, waiting = shared_store.open_store(address, key), shared_store.begin()
    written = False
    while (manifest := _whole(store, fingerprint)) is None:
        taken, waiting = shared_store.take(store, waiting)
        if not taken:
            time.sleep(shared_store.POLL_SECONDS)
            continue
        with shared_store.held(store, waiting.me):
            manifest = _whole(store, fingerprint)  # there if it was finished between our look and the lock
            if manifest is None:
                cache, _ = find_or_build(root, fingerprint, produce)
                manifest, written = _publish(store, cache, fingerprint), True
        break
    return _copy_here(store, manifest, root, key), written


def _whole(store: Store, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if all files that it names are there and as long as they were written."""
    try:
        manifest = json.loads(shared_store.read(store, MANIFEST))
        paths = {f"{store.path}/{manifest['id']}/{name}": size for name, size in manifest["bytes"].items()}
        ask(store, "invalidate_cache")  # of listings: another machine may have written since
        sizes = {path: ask(store, "size", path, answers=(FileNotFoundError,)) for path in paths}
    except (ValueError, KeyError, TypeError, FileNotFoundError):  # no manifest, half of one, or a file is missing
        return None
    return manifest if sizes == paths and holds(manifest, fingerprint) else None


def _copy_here(store: Store, manifest: dict[str, Any], root: Path, key: str) -> PairCache:
    """The local copy of exactly this build."""

    def copy(directory: Path) -> None:
        for name in manifest["bytes"]:
            ask(store, "get_file", f"{store.path}/{manifest['id']}/{name}", str(directory / name))
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))

    return install(root, key, lambda mine: mine["id"] == manifest["id"], copy)[0]


def _publish(store: Store, cache: PairCache, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Upload a local cache's files, the manifest last; returns the manifest that is there then, in general this one."""
    place = f"{store.path}/{cache.manifest['id']}"
    shared_store.make_directory(store, place)
    for name in cache.manifest["bytes"]:
        ask(store, "put_file", str(Path(cache.directory) / name), f"{place}/{name}")
    if (theirs := _whole(store, fingerprint)) is not None:  # we slept, lost the lock, and another was quicker
        return theirs
    ask(store, "pipe_file", f"{store.path}/{MANIFEST}", json.dumps(cache.manifest, indent=1).encode())
    if (mine := _whole(store, fingerprint)) is None:
        raise UserError(f"cache_dir={store.address}: what was just written is not there; is it being deleted?")
    with contextlib.suppress(Exception):  # what killed builders left harms nobody
        for path in store.filesystem.ls(store.path, detail=False):
            if path.rstrip("/").rsplit("/", 1)[-1] not in (MANIFEST, LOCK, cache.manifest["id"]):
                store.filesystem.rm(path, recursive=True)
    return mine
