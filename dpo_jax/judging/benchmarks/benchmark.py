"""A benchmark of judges: how its rows are told and read, and its own way from verdicts to a score. No JAX.

In all of them a comparison without a verdict is not right, as in their own code, and is counted.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.data.comparison import Skip
from dpo_jax.judging.tasks import JudgedTask, Task
from dpo_jax.preference.statistics import bootstrap_error

Row = Mapping[str, Any]
ByPart = Mapping[str, Sequence[JudgedTask]]
Score = tuple[float, float]  # and its standard error


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      name: for `--format` and reports.
      about: what its accuracy is, and where that is published.
      columns: that a row of it has.
      is_row: whether a row of a file is one of it.
      task: a row's task, or why it has none; raises a `UserError` where its prompt says nothing.
      value: of a judged task, from 0 to 1; NaN leaves it out.
      weights: of the parts in the accuracy, by their numbers of tasks; they need no sum.
      more: further figures, of all tasks by their parts and the parts' scores.
      scores: parts that have a score of their own in place of the mean of values.
    """

    name: str
    about: str
    columns: tuple[str, ...]
    is_row: Callable[[Row], bool]
    task: Callable[[Row, str], Task | Skip]
    value: Callable[[JudgedTask], float]
    weights: Callable[[Mapping[str, int]], Mapping[str, float]] = lambda sizes: sizes
    more: Callable[[ByPart, Mapping[str, float]], dict[str, float]] = lambda by_part, scores: {}
    scores: Mapping[str, Callable[[Sequence[JudgedTask]], Score]] = dataclasses.field(default_factory=dict)


def equally(sizes: Mapping[str, int]) -> dict[str, float]:
    """Weights of parts that count the same, however large."""
    return dict.fromkeys(sizes, 1.0)


def all_above(one: JudgedTask) -> float:
    """1 if every good one is better than every bad one."""
    return float((one.margins > 0).all())


def are_texts(value: Any) -> bool:
    """Whether this is a list of texts, at least one."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, str) for one in value)


def has_lists(row: Row) -> bool:
    """Whether `chosen` and `rejected` are lists of texts."""
    return are_texts(row.get("chosen")) and are_texts(row.get("rejected"))


def weighted_means(parts: np.ndarray, weights: np.ndarray) -> Score:
    """sum_c weights_c * mean(parts[:, c]) over what is not NaN, and its standard error over the rows.

    Args:
      parts: `[n, c]`; weights: `[c]`. A column of NaN alone counts as 0.
    """
    there = ~np.isnan(parts)
    counts = np.maximum(there.sum(0), 1)
    means = np.where(there, parts, 0.0).sum(0) / counts
    # What each row moves the sum by, times n: their mean is 0, and the error of the sum is that of their mean.
    moved = (np.where(there, parts - means, 0.0) / counts * len(parts)) @ weights
    return float(weights @ means), bootstrap_error(moved)
