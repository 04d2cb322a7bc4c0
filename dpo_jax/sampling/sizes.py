"""Which sizes a program runs in, where one that is compiled for more would do, too. No JAX."""

import collections
from collections.abc import Callable

# Operations that compiling a program of the sampler takes the time of: seconds times operations/s.
WORTH_COMPILING = {"cpu": 2e11, "gpu": 1e15, "tpu": 1e15}


class Sizes:
    """The sizes that a program has run in. A larger one serves until it has wasted what compiling is worth.

    Ski rental: never more than twice what would have been best, whatever comes (Karlin, Manasse, Rudolph and Sleator
    1988).

    Args:
      worth: operations that compiling is worth.
    """

    def __init__(self, worth: float):
        self.worth = worth
        self._sizes: list[tuple[int, ...]] = []
        self._wasted: collections.defaultdict[tuple[int, ...], float] = collections.defaultdict(float)

    def choose(self, wanted: tuple[int, ...], operations: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
        """The size to run for a `wanted` one: itself, or one that has run and is no smaller in anything."""
        if wanted in self._sizes:
            return wanted
        fit = [one for one in self._sizes if all(a >= b for a, b in zip(one, wanted, strict=True))]
        if fit:
            best = min(fit, key=operations)
            self._wasted[wanted] += operations(best) - operations(wanted)
            if self._wasted[wanted] < self.worth:
                return best
        self._sizes.append(wanted)
        return wanted
