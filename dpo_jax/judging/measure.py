"""How well a judge agrees with labels: a benchmark's accuracy and its error, in all and by part. No JAX."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.judging.benchmarks.benchmark import Benchmark
from dpo_jax.judging.tasks import JudgedTask
from dpo_jax.preference.statistics import bootstrap_error, mean_or_nan

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """A judge's figures on a benchmark; docs/judging.md has what each one means. NaN where there is none.

    Attributes:
      judge, data, format: names of the judge, of what was read, and of the benchmark.
      about: what the accuracy is, in words.
      accuracy, accuracy_error: in the benchmark's own aggregation, and its standard error over rows.
      ties: share of verdicts that are exactly 0.
      no_verdict: comparisons without one.
      items, comparisons: rows (or pairs) that were judged, and what was compared for them.
      parts: accuracy, accuracy_error, ties, no_verdict, items of each part.
      more: the benchmark's further figures.
      left_out: rows or pairs that were not judged, by reason.
    """

    judge: str
    data: str
    format: str
    about: str
    accuracy: float
    accuracy_error: float
    ties: float
    no_verdict: int
    items: int
    comparisons: int
    parts: Mapping[str, Figures]
    more: Figures
    left_out: Mapping[str, int]


def measured(
    benchmark: Benchmark, judged: Sequence[JudgedTask], *, judge: str, data: str, left_out: Mapping[str, int]
) -> Measured:
    """The figures of all judged tasks."""
    by_part: dict[str, list[JudgedTask]] = {}
    for one in judged:
        by_part.setdefault(one.task.part, []).append(one)
    by_part = dict(sorted(by_part.items()))
    values = {name: _values(benchmark, part) for name, part in by_part.items()}
    parts = {name: _part(benchmark, name, part, values[name]) for name, part in by_part.items()}
    accuracy, error = _total(benchmark, values, parts)
    ties, no_verdict = _counts(judged)
    return Measured(
        judge=judge,
        data=data,
        format=benchmark.name,
        about=benchmark.about,
        accuracy=accuracy,
        accuracy_error=error,
        ties=ties,
        no_verdict=no_verdict,
        items=len(judged),
        comparisons=sum(one.margins.size for one in judged),
        parts=parts,
        more=benchmark.more(by_part, {name: part["accuracy"] for name, part in parts.items()}),
        left_out=dict(left_out),
    )


def _values(benchmark: Benchmark, part: Sequence[JudgedTask]) -> np.ndarray:
    values = np.array([benchmark.value(one) for one in part])
    return values[~np.isnan(values)]


def _part(benchmark: Benchmark, name: str, part: Sequence[JudgedTask], values: np.ndarray) -> dict[str, float]:
    own = benchmark.scores.get(name)
    accuracy, error = own(part) if own else (mean_or_nan(values), bootstrap_error(values))
    ties, no_verdict = _counts(part)
    return {
        "accuracy": accuracy,
        "accuracy_error": error,
        "ties": ties,
        "no_verdict": no_verdict,
        "items": len(part),
    }


def _counts(judged: Sequence[JudgedTask]) -> tuple[float, int]:
    """The share of ties among verdicts, and how many comparisons have none."""
    margins = np.concatenate([one.margins.ravel() for one in judged])
    there = ~np.isnan(margins)
    return mean_or_nan((margins[there] == 0).astype(np.float64)), int((~there).sum())


def _total(benchmark: Benchmark, values: Mapping[str, np.ndarray], parts: Mapping[str, Figures]) -> tuple[float, float]:
    """The parts' scores by their weights; their errors are independent."""
    sizes = {name: len(part) for name, part in values.items() if len(part)}
    weights = benchmark.weights(sizes)
    if weights == sizes:  # every task counts the same: parts are no more than a view
        whole = np.concatenate([values[name] for name in sizes]) if sizes else np.zeros(0)
        return mean_or_nan(whole), bootstrap_error(whole)
    total = sum(weights.values())
    accuracy = sum(weight * parts[name]["accuracy"] for name, weight in weights.items()) / total
    squares = sum((weight * parts[name]["accuracy_error"]) ** 2 for name, weight in weights.items())
    return accuracy, math.sqrt(squares) / total
