"""What a reward model's last evaluation leaves: the scores of every held-out pair, and what they say of it."""

import math
from collections.abc import Sequence
from typing import Any

SCORES = ("chosen", "rejected")
BINS = 24
CALIBRATION = 10  # bins of the predicted probability


def score_histograms(held: dict[str, Any], bins: int = BINS) -> tuple[dict[str, list[tuple[float, int]]], float]:
    """Pairs by score, of chosen and of rejected, in bins that both share: (middle of a bin, count), and a bin's width.

    >>> found, width = score_histograms({"chosen": [0.0, 3.0], "rejected": [1.0, -1.0]}, bins=4)
    >>> found["chosen"], width
    ([(-0.5, 0), (0.5, 1), (1.5, 0), (2.5, 1)], 1.0)
    """
    every = [x for name in SCORES for x in held[name]]
    low, high = min(every), max(every)
    width = (high - low) / bins or 1.0
    found = {}
    for name in SCORES:
        counts = [0] * bins
        for score in held[name]:
            counts[min(bins - 1, int((score - low) / width))] += 1
        found[name] = [(low + (i + 0.5) * width, count) for i, count in enumerate(counts)]
    return found, width


def calibration(margins: Sequence[float], bins: int = CALIBRATION) -> list[tuple[float, float, int]]:
    """How often the model is right where it says how sure it is.

    A pair's margin m says that its better side wins with probability σ(|m|), from 0.5 to 1; it is right where m > 0.

    Returns:
      Of every bin of that probability with pairs in it: the mean probability, the share that is right (margins of 0
      are half right), and how many there are.

    >>> calibration([2.0, 2.0, -2.0, 0.0], bins=2)
    [(0.5, 0.5, 1), (0.8807970779778823, 0.6666666666666666, 3)]
    """
    found: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for margin in margins:
        sure = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        right = 0.5 if margin == 0 else float(margin > 0)
        found[min(bins - 1, int((sure - 0.5) * 2 * bins))].append((sure, right))
    return [
        (sum(s for s, _ in here) / len(here), sum(r for _, r in here) / len(here), len(here)) for here in found if here
    ]


def expected_calibration_error(margins: Sequence[float], bins: int = CALIBRATION) -> float:
    """Mean distance of how sure the model is from how often it is right, by pairs (Guo et al. 2017, arXiv 1706.04599).

    >>> expected_calibration_error([0.0, 0.0])
    0.0
    """
    return sum(abs(sure - right) * n for sure, right, n in calibration(margins, bins)) / max(1, len(margins))
