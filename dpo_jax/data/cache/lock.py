"""A directory that several machines see, at any address fsspec knows, and a lock in it.

Every call that fails is a `UserError` in one line, whatever the cloud library raises. The lock is an object that is
created exclusively, with its owner's name and the time; a thread renews it, and one that is not renewed for
`STALE_SECONDS` belongs to a killed process and is taken over. It spares work and no more: an owner that only slept so
long goes on beside its heir, so what is written under it must be right with two writers too.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dpo_jax.errors import UserError

BEAT_SECONDS = 20.0  # between two renewals of the lock
STALE_SECONDS = 180.0  # without a renewal: its owner is dead
POLL_SECONDS = 3.0  # between two looks of those who wait
LOCK = "lock.json"
# Where directories come into being with their files; makedirs would create a bucket for a misspelt name.
_BUCKETS = {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss"}


@dataclass(frozen=True)
class Store:
    """fsspec's file system, a directory's path in it, and the address for messages."""

    filesystem: Any
    path: str
    address: str


@dataclass(frozen=True)
class Waiting:
    """What a waiting process knows: its own name, the lock as it last saw it, and since when (monotonic seconds)."""

    me: str
    lock: bytes
    since: float


def open_store(address: str, name: str) -> Store:
    """The directory `address/name`; nothing is asked of the network yet.

    Raises:
      UserError: the protocol is unknown or its library is not installed.
    """
    try:
        filesystem, inner = fsspec.core.url_to_fs(address)
    except Exception as error:  # a missing library, an unknown protocol, credentials: no common class
        raise UserError(f"cache_dir={address}: {error}; for gs:// run pip install 'dpo_jax[gcs]'") from error
    return Store(filesystem, f"{inner.rstrip('/')}/{name}", address)


def ask(store: Store, operation: str, *args: Any, answers: tuple[type[Exception], ...] = (), **options: Any) -> Any:
    """One call of the file system; `answers` are exceptions that tell something, every other one is a UserError."""
    try:
        return getattr(store.filesystem, operation)(*args, **options)
    except answers:
        raise
    except Exception as error:  # OSError, and each cloud library's own classes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"cache_dir={store.address}: cannot be reached or written ({reason[:200]}); check the address, the network "
            "and the credentials, or give a local --config.cache_dir"
        ) from error


def read(store: Store, name: str) -> bytes:
    """A small file's content; empty if it is not there."""
    try:
        return ask(store, "cat_file", f"{store.path}/{name}", answers=(FileNotFoundError,))
    except FileNotFoundError:
        return b""


def make_directory(store: Store, path: str) -> None:
    """Where the file system has directories of their own."""
    protocols = store.filesystem.protocol
    if not _BUCKETS & set([protocols] if isinstance(protocols, str) else protocols):
        ask(store, "makedirs", path, exist_ok=True)


def begin() -> Waiting:
    """For the first call of `take`."""
    return Waiting(f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}", b"", time.monotonic())


def take(store: Store, waiting: Waiting) -> tuple[bool, Waiting]:
    """Take the lock if nobody has it or its owner is dead; else say once who has it. For the next call: the second."""
    lock, mine = read(store, LOCK), _content(waiting.me)
    if not lock:
        make_directory(store, store.path)
        if _create(store, mine):
            return True, waiting
        # Another was quicker, and may have been killed before it wrote its name: an empty lock gets old, too.
    if lock != waiting.lock:
        if _owner(lock) != _owner(waiting.lock):
            logging.getLogger(__name__).warning("%s is written by %s; waiting for it", store.path, _owner(lock))
        waiting = Waiting(waiting.me, lock, time.monotonic())
    try:
        age = abs(time.time() - json.loads(lock)["time"])  # abs: a clock that is hours ahead keeps nobody waiting
    except (ValueError, KeyError, TypeError):
        age = 0.0
    if max(age, time.monotonic() - waiting.since) < STALE_SECONDS:
        return False, waiting
    # Several may see this at once: each writes its name over it, and after a while the last one's stands there.
    ask(store, "pipe_file", f"{store.path}/{LOCK}", mine)
    time.sleep(POLL_SECONDS)
    return _owner(read(store, LOCK)) == waiting.me, waiting


@contextlib.contextmanager
def held(store: Store, me: str) -> Iterator[None]:
    """Renew the lock that `take` took, in a thread, and remove it at the end."""
    done, path = threading.Event(), f"{store.path}/{LOCK}"

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            with contextlib.suppress(UserError):  # a renewal that is lost is no reason to stop
                if _owner(read(store, LOCK)) == me:
                    ask(store, "pipe_file", path, _content(me))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(UserError):
            if _owner(read(store, LOCK)) == me:
                ask(store, "rm", path)


def _content(owner: str) -> bytes:
    return json.dumps({"owner": owner, "time": time.time()}).encode()


def _owner(lock: bytes) -> str:
    try:
        return str(json.loads(lock)["owner"])
    except (ValueError, KeyError, TypeError):  # none, or one that is being written
        return ""


def _create(store: Store, content: bytes) -> bool:
    """Write the lock unless it is there, and say whether it was written; of two at once only one does."""
    path = f"{store.path}/{LOCK}"
    try:
        if isinstance(store.filesystem, LocalFileSystem):  # its pipe_file looks first and then writes: both would
            with ask(store, "open", path, "xb", answers=(FileExistsError,)) as stream:
                stream.write(content)
        else:
            ask(store, "pipe_file", path, content, mode="create", answers=(FileExistsError,))
    except FileExistsError:
        return False
    return True
