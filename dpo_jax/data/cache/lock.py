"""One process at a time makes a cache; a process that holds the lock and no longer moves is not waited for.

The lock is the kernel's (`flock`), so a process that ends in any way has let go of it. While it is held, a thread
touches the lock's file now and then: a process that is stopped or hangs in the kernel does not, and is recognised.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dpo_jax.errors import escaped

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system that has none
BEAT_SECONDS = 5.0
SILENT_SECONDS = 120.0  # without a beat, the holder does not move; network file systems show one up to 60 s late
_POLL_SECONDS = 0.25
_FIRST_WORD_SECONDS, _NEXT_WORD_SECONDS = 10.0, 600.0  # of waiting, until it is said and said again
_MOST_BYTES = 1000  # of what a holder writes about itself


@contextlib.contextmanager
def cache_lock(root: Path, key: str) -> Iterator[bool]:
    """Only one process is in here for one cache; others wait, as long as the one that holds the lock moves.

    Yields whether the lock is held: not where the file system has none, and not where the holder is frozen. What is
    made then must come to its place in one step, as somebody else may make the same.

    Raises:
      OSError: there can be no lock in `root`.
    """
    path = root / f"{key}.lock"
    # No link is followed, and no pipe waited for: neither is a lock of ours.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with contextlib.ExitStack() as held:
        held.callback(os.close, lock)
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is no regular file; remove it", str(path))
        mine = _acquire(lock, path)
        if mine:
            held.enter_context(_beating(lock))
        yield mine


def warn(line: str) -> None:
    """Say something about a cache, at once: what follows may take long."""
    print(f"warning: {escaped(line)}", flush=True)


def _acquire(lock: int, path: Path) -> bool:
    """Wait for the lock; False if there is none to have, or its holder does not move."""
    began = moved = time.monotonic()
    last, next_word = -1, began + _FIRST_WORD_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
        # By this process's clock alone: a file server's may be another.
        now, beat = time.monotonic(), os.fstat(lock).st_mtime_ns
        if beat != last:
            last, moved = beat, now
        if now - moved >= SILENT_SECONDS:
            warn(
                f"{path}: {_holder(lock)} has this lock and has not moved for {now - moved:.0f} s; the cache is made "
                "without it (end that process if it is of no use)"
            )
            return False
        if now >= next_word:
            warn(f"waiting for {_holder(lock)}, which makes the cache {path.stem} ({now - began:.0f} s so far)")
            next_word = now + _NEXT_WORD_SECONDS
        time.sleep(_POLL_SECONDS)


def _holder(lock: int) -> str:
    """Who says to hold the lock."""
    try:
        said = json.loads(os.pread(lock, _MOST_BYTES, 0))
        return f"process {int(said['pid'])} on {str(said['host'])[:100]}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


@contextlib.contextmanager
def _beating(lock: int) -> Iterator[None]:
    """Within it the lock's file says who has it, and is touched now and then."""
    about = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    with contextlib.suppress(OSError):  # the disk is full: what follows will say so
        os.ftruncate(lock, 0)
        os.pwrite(lock, about, 0)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(lock)

    thread = threading.Thread(target=beat, name="cache lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
