"""Lengths of pairs in numbers: their part of data.json."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

PARTS = ("prompt", "chosen", "rejected")
BINS = 40  # about so many in a histogram


def token_table(lengths: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean, median, 90th percentile and maximum of the tokens of each part; `lengths` is int `[n, 3]`."""
    lengths = lengths if len(lengths) else np.zeros((1, len(PARTS)), np.int32)
    return {
        part: {
            "mean": round(float(column.mean()), 2),
            "p50": round(float(np.percentile(column, 50)), 1),
            "p90": round(float(np.percentile(column, 90)), 1),
            "max": int(column.max()),
        }
        for part, column in zip(PARTS, lengths.T, strict=True)
    }


def count_bins(values: np.ndarray) -> dict[str, Any]:
    """Counts of integers in about `BINS` bins of equal width, of which one begins at 0.

    Returns:
      `start`: the first bin's lowest value; `width`: of a bin; `counts`, one a bin.

    >>> count_bins(np.array([0, 1, 1, 3]))
    {'start': 0, 'width': 1, 'counts': [1, 2, 0, 1]}
    """
    low, high = int(values.min()), int(values.max())
    width = max(1, math.ceil((high - min(low, 0) + 1) / BINS))
    edges = np.arange(math.floor(min(low, 0) / width), high // width + 2) * width
    counts, _ = np.histogram(values, edges)
    return {"start": int(edges[0]), "width": width, "counts": counts.tolist()}


def bin_points(histogram: Mapping[str, Any]) -> tuple[list[tuple[float, int]], int]:
    """A histogram as it is drawn: (middle of the bin, count) for every bin, and their width.

    >>> bin_points({"start": 0, "width": 4, "counts": [3, 1]})
    ([(1.5, 3), (5.5, 1)], 4)
    """
    start, width = histogram["start"], histogram["width"]
    return [(start + i * width + (width - 1) / 2, n) for i, n in enumerate(histogram["counts"])], width


def length_report(lengths: np.ndarray) -> dict[str, Any]:
    """How pairs' lengths are spread: for `splits` of data.json.

    Returns:
      `longer`: fractions of the pairs whose `chosen` (`rejected`) completion is the longer one, and the
      `mean_difference` of chosen − rejected, tokens; `histograms` of the parts and of this `difference`.
    """
    if not len(lengths):
        return {}
    apart = lengths[:, 1].astype(np.int64) - lengths[:, 2]
    columns = dict(zip(PARTS, lengths.T, strict=True)) | {"difference": apart}
    return {
        "longer": {
            "chosen": round(float((apart > 0).mean()), 4),
            "rejected": round(float((apart < 0).mean()), 4),
            "mean_difference": round(float(apart.mean()), 2),
        },
        "histograms": {name: count_bins(column) for name, column in columns.items()},
    }
