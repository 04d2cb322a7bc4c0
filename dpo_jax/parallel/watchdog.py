"""Ends a process that hangs, with the stacks of all its threads: a hang is silent and costs money."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from dpo_jax.errors import STUCK

LONGER = 4.0  # times the patience: for compiling and saving
T = TypeVar("T")


class _Now:
    """What this process is at, since when, and how many times longer than usual that may take."""

    doing = ""
    since = 0.0
    patience = 1.0


def beat(doing: str, patience: float = 1.0) -> None:
    """Something has moved, and now this is being done: `beat("waiting for the rows of step 12")`."""
    _Now.doing, _Now.since, _Now.patience = doing, time.monotonic(), patience


def awaited(items: Iterator[T], what: str) -> Iterator[T]:
    """The same items; waiting for one of them is named by `what`."""
    while True:
        beat(f"waiting for {what}")
        try:
            item = next(items)
        except StopIteration:
            return
        yield item


@contextlib.contextmanager
def watch(seconds: float) -> Iterator[None]:
    """While in here, `seconds` without a `beat` end the process with exit code 70; 0 never does."""
    over = threading.Event()
    if seconds > 0:
        beat("starting")
        threading.Thread(target=_guard, args=(seconds, over), name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _guard(seconds: float, over: threading.Event) -> None:
    pause = min(1.0, seconds / 4)
    before = time.monotonic()
    while not over.wait(pause):
        now = time.monotonic()
        if now - before > 10 * pause:  # this process was suspended, its threads could not move
            _Now.since += now - before
        before = now
        quiet = now - _Now.since
        if quiet > seconds * _Now.patience:
            _end(quiet)


def _end(quiet: float) -> None:
    stderr = sys.__stderr__ or sys.stderr
    print(
        f"error: nothing has moved for {quiet:.0f} s while {_Now.doing}, so this process ends (exit code {STUCK}); the "
        "stacks of all its threads follow. Checkpoints are kept and the same command resumes the run; where this only "
        "takes long, raise stuck_after_seconds (0: wait for ever)",
        file=stderr,
        flush=True,
    )
    faulthandler.dump_traceback(stderr, all_threads=True)
    os._exit(STUCK)
