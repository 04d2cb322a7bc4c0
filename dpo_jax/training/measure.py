"""What is measured of a run: how fast it trains, and how much memory its process uses."""

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


class Throughput:
    """Pairs per second and seconds per step since the last record, without the time spent in `paused`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._start = self._clock()
        self._steps = 0
        self._pairs = 0.0
        self._paused = 0.0

    def count(self, pairs: float) -> None:
        """One more step is done, with this many pairs."""
        self._steps += 1
        self._pairs += pairs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training: evaluation, checkpoints, sampling."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def take(self) -> dict[str, float]:
        """`pairs_per_second` (if there were any) and `step_seconds` since the last call; empty without a step."""
        seconds = self._clock() - self._start - self._paused
        steps, pairs = self._steps, self._pairs
        self._reset()
        if not steps or seconds <= 0:
            return {}
        return ({"pairs_per_second": pairs / seconds} if pairs else {}) | {"step_seconds": seconds / steps}


def peak_gb() -> float:
    """The most memory used so far, in GB (1e9 bytes).

    Of this process's devices the fullest one counts, by its allocator's own count; where there is none (CPU), it is
    the resident set of the whole process.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [held["peak_bytes_in_use"] for held in stats if "peak_bytes_in_use" in held]:
        return max(peaks) / 1e9
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / 1e9  # Linux counts KiB


def give_back() -> None:
    """Return to the system what is free in the C library's heap, where that is glibc (`malloc_trim`, malloc_trim(3)).

    Compiling leaves the heap full of holes: half a gigabyte after a step on CPU that would stay resident to the end.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
