"""Mixtures of datasets: how many pairs of every part are in an epoch, and which.

An epoch is as long as the scarcest part allows without using a pair twice. Every part is read in an order of its own,
and each epoch continues where the one before stopped: a plentiful part gives other pairs until all have been used.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """The parts that pairs are from.

    Attributes:
      part: int `[n]`, which part each pair is from.
      weights: positive, by part; proportions, whatever their sum.
    """

    part: np.ndarray
    weights: tuple[float, ...]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Pairs there are, int64 `[parts]`."""
        return np.bincount(self.part, minlength=len(self.weights))

    def epoch_size(self, batch_size: int, drop_remainder: bool) -> int:
        """Pairs of an epoch: the most in which no part gives a pair twice; whole batches if the rest is dropped."""
        shares = np.asarray(self.weights) / sum(self.weights)
        size = int(np.floor(np.min(self.sizes / shares) + 1e-9))
        while size and (apportion(size, self.weights) > self.sizes).any():  # rounding may ask for one more
            size -= 1
        return size // batch_size * batch_size if drop_remainder else size

    def members(self, size: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """The pairs of an epoch, int64 `[size]`, spread evenly: every stretch has nearly the right proportions."""
        taken = []
        for part, count in enumerate(apportion(size, self.weights).tolist()):
            own = np.flatnonzero(self.part == part)
            taken.append(own[_stretch(len(own), count, epoch, [seed, part] if shuffle else None)])
        return spread(taken)


def _stretch(n: int, count: int, epoch: int, seed: list[int] | None) -> np.ndarray:
    """The stretch of number `epoch` through laps over `n` pairs, `count` of them, none twice.

    Every lap has an order of its own (the file's without a seed). A stretch that begins in one lap and ends in the next
    would meet some pairs again: these come last in the next lap.
    """
    begin, end = epoch * count, (epoch + 1) * count
    rest = np.zeros(0, np.int64)
    out: list[np.ndarray] = []
    for lap in range(-(-end // n)):
        order = np.arange(n) if seed is None else np.random.default_rng([*seed, lap, 4]).permutation(n)
        again = np.isin(order, rest)
        order = np.concatenate([order[~again], order[again]])
        first = lap * n
        out = [order[max(0, begin - first) : max(0, end - first)]] if begin >= first else [*out, order[: end - first]]
        rest = order[n - (first + n) % count :]
    return np.concatenate(out) if out else rest


def spread(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All members of the parts, each part's at even distances."""
    places = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts]
    return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


def apportion(total: int, weights: Sequence[float]) -> np.ndarray:
    """`total` as whole numbers in the proportions of `weights` (largest remainders), int64.

    >>> apportion(10, [0.7, 0.3]).tolist(), apportion(10, [1, 1, 1]).tolist()
    ([7, 3], [4, 3, 3])
    """
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return counts
