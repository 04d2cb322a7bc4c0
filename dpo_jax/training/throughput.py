"""How fast training is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
