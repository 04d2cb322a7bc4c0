"""One run at a time in a directory of a bucket: an object that says who has it, written again as long as it lives.

A bucket has no locks that end with a process. So whoever has the directory writes a heartbeat, and it is free when
none came for a while; every write asks for the generation that the writer knows, so only one of several can succeed.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_jax.bucket import client
from dpo_jax.bucket.path import BucketPath
from dpo_jax.errors import BAD_INPUT, UserError

LEASE = "lease.json"
BEAT_SECONDS, EXPIRES_SECONDS = 10.0, 45.0
LONG_AGO = 600.0  # by clocks of different machines
_LOOK_SECONDS = 1.0
_LIVE: set[str] = set()  # ids of the leases that this process holds


@contextlib.contextmanager
def leased(directory: BucketPath) -> Iterator[None]:
    """Hold a directory of a bucket while in here. One whose holder died is free `EXPIRES_SECONDS` after its last sign,
    at once where that can be seen to be gone: it was a process of this machine, or the sign is long ago.

    A holder that finds its directory taken (it was suspended for long) ends at once, with a line: it would write into
    another's run.

    Raises:
      UserError: another run holds it, or the bucket cannot be used.
    """
    path = directory / LEASE
    me = _me()
    generation = _take(directory, path, me)
    _LIVE.add(me["id"])
    over, held = threading.Event(), [generation]
    thread = threading.Thread(target=_beat, args=(directory, path, me, held, over), name="lease", daemon=True)
    thread.start()
    try:
        yield
    except client.BucketError:
        over.set()
        raise  # nothing is asked of the bucket any more: the lease expires by itself
    finally:
        _LIVE.discard(me["id"])
        if not over.is_set():
            over.set()
            thread.join(timeout=BEAT_SECONDS)
            with contextlib.suppress(UserError):
                now = client.find_object(path.bucket, path.key)
                if now is not None and now.generation == held[0]:
                    client.delete_object(path.bucket, path.key, generation=held[0])


def _take(directory: BucketPath, path: BucketPath, me: dict[str, Any]) -> int:
    """Make the lease ours; returns its generation."""
    seen, since, told = 0, time.monotonic(), False
    while True:
        held = client.find_object(path.bucket, path.key)
        if held is None:
            with contextlib.suppress(client.Overtaken):
                return client.write_object(path.bucket, path.key, _content(me), generation=0)
            continue
        theirs = _read(path)
        lives = _lives(theirs, me)
        if lives or (seen and held.generation != seen):  # a sign of life
            raise UserError(
                f"workdir {directory} is in use by {_named(theirs)}; wait for it or end it, or choose another --workdir"
            )
        if not seen:
            seen, since = held.generation, time.monotonic()
        age = (datetime.now(UTC) - held.updated).total_seconds()
        quiet = time.monotonic() - since
        if lives is False or age > LONG_AGO or quiet > EXPIRES_SECONDS:
            with contextlib.suppress(client.Overtaken):
                return client.write_object(path.bucket, path.key, _content(me), generation=held.generation)
            continue
        if not told and quiet > 2 * BEAT_SECONDS:
            told = True
            left = EXPIRES_SECONDS - quiet
            print(
                f"workdir {directory} was in use by {_named(theirs)}, which gives no sign; waiting {left:.0f} s to be "
                "sure that it is gone",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_LOOK_SECONDS)


def _beat(directory: BucketPath, path: BucketPath, me: dict[str, Any], held: list[int], over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        me["beat"] += 1
        try:
            held[0] = client.write_object(path.bucket, path.key, _content(me), generation=held[0])
        except client.Overtaken:
            if over.is_set():
                return
            if (ours := _ours(path, me)) is not None:  # an earlier sign arrived, and its answer did not
                held[0] = ours
                continue
            who = "nobody"
            with contextlib.suppress(UserError, OSError):
                who = _named(_read(path))
            stderr = sys.__stderr__ or sys.stderr
            print(
                f"error: workdir {directory} is held by {who} now, as this process gave no sign for long; it ends, so "
                "that it writes nothing into the other's run",
                file=stderr,
                flush=True,
            )
            os._exit(BAD_INPUT)
        except UserError:  # the bucket does not answer: whatever the run writes itself says so
            continue


def _ours(path: BucketPath, me: dict[str, Any]) -> int | None:
    """The generation of the lease, if it is this holder's own still."""
    with contextlib.suppress(UserError, OSError):
        now = client.find_object(path.bucket, path.key)
        if now is not None and _read(path).get("id") == me["id"]:
            return now.generation
    return None


def _me() -> dict[str, Any]:
    """This process, and what tells whether another one on the same machine still lives."""
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "id": secrets.token_hex(8),
        "beat": 0,
    }


def _machine() -> str:
    """This boot of this machine, and the space in which its process numbers are unique; empty if not known."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(process: int) -> str:
    """When a process of this machine was started, in the kernel's count; empty: there is none."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # it has ended and only its parent has not looked yet
    return ""


def _lives(theirs: dict[str, Any], me: dict[str, Any]) -> bool | None:
    """Whether the holder lives; None: it is of another machine, and cannot be seen."""
    process = theirs.get("process")
    if theirs.get("id") in _LIVE:
        return True
    if not me["machine"] or theirs.get("machine") != me["machine"] or not isinstance(process, int):
        return None
    # One of this process that is not held any more is left over of a run whose bucket did not answer at its end.
    return process != me["process"] and _started(process) == theirs.get("started")


def _content(me: dict[str, Any]) -> bytes:
    return json.dumps(me, indent=1).encode() + b"\n"


def _read(path: BucketPath) -> dict[str, Any]:
    """Whoever holds the lease; empty where it says nothing that can be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def _named(theirs: dict[str, Any]) -> str:
    process, host = theirs.get("process"), theirs.get("host")
    if not isinstance(process, int) or not isinstance(host, str):
        return "another run"
    return f"process {process} on {''.join(c for c in host if c.isprintable()):.80}"
