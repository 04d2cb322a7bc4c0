"""RewardBench 2: best of four, and prompts with several right answers. No JAX.

Malik et al. 2025, arXiv 2506.01937; `reroll_and_score_dataset` and `process_single_model` in rewardbench/utils.py of
github.com/allenai/reward-bench.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpo_jax.data.comparison import Skip
from dpo_jax.judging.benchmarks.benchmark import (
    Benchmark,
    Row,
    Score,
    all_above,
    are_texts,
    equally,
    has_lists,
    weighted_means,
)
from dpo_jax.judging.tasks import JudgedTask, Task, text_task

TIES = "Ties"


def _task(row: Row, where: str) -> Task | Skip:
    good, bad, name = row["chosen"], row["rejected"], str(row.get("id", ""))
    if not (are_texts(good) and are_texts(bad)):
        return Skip("not_text", "chosen and rejected must be lists of texts")
    part = str(row.get("subset") or "all")
    task = text_task(where, name, TIES if part.lower() == "ties" else part, row["prompt"], good, bad)
    if task.part == TIES:
        if name.partition(":")[0] not in ("ref", "tied") or not name.partition(":")[2]:
            return Skip("bad_id", f"id is {name!r:.40}; needed in the subset Ties is ref:N or tied:N")
        return replace(task, among_good=True)
    if len(good) != 1:
        return Skip("several_chosen", f"{len(good)} chosen answers; only the subset Ties has more than one")
    return task


def best_of_all(one: JudgedTask) -> float:
    """1 if the good one is above all bad ones, 1 / (1 + n) if it shares the first place with n, else 0."""
    margins = one.margins[0]
    return 1 / (1 + int((margins == 0).sum())) if (margins >= 0).all() else 0.0


def ties_score(judged: Sequence[JudgedTask]) -> Score:
    """RewardBench 2's score of prompts with several right answers, `tied:N`, and of the same with one, `ref:N`.

    0.3 accuracy of `tied` (every right answer above every wrong one) + 0.3 accuracy of `ref` + 0.2 the share of prompts
    where the gap between right and wrong is wider than the range of the right ones + 0.2 the same with the narrower gap
    of `tied` and `ref` + 0.01 mean tanh(that gap / range - 1).

    A judge that only compares has no scores: its gap is the least verdict of a right answer against a wrong one, its
    range the largest between two right ones. For scores that would decide the same, as a verdict grows with the
    difference.

    The error is over prompts, a `tied` and its `ref` together.
    """
    kinds = {kind: {} for kind in ("tied", "ref")}  # type: dict[str, dict[str, JudgedTask]]
    for one in judged:
        kind, _, number = one.task.id.partition(":")
        kinds[kind][number] = one
    numbers = sorted(kinds["tied"].keys() | kinds["ref"].keys())
    parts = np.array([_tied_parts(kinds["tied"].get(n), kinds["ref"].get(n)) for n in numbers])
    return weighted_means(parts, np.array([0.3, 0.3, 0.2, 0.2, 0.01]))


def _tied_parts(tied: JudgedTask | None, ref: JudgedTask | None) -> list[float]:
    """Of one prompt, what `ties_score` takes the means of; NaN where a row is missing."""
    found = [math.nan if one is None else all_above(one) for one in (tied, ref)]
    if tied is None or ref is None:
        return [*found, math.nan, math.nan, math.nan]
    gap, spread = tied.margins.min(), tied.spread
    least = np.minimum(gap, ref.margins.min())
    with np.errstate(divide="ignore", invalid="ignore"):
        wide = np.nan_to_num(np.tanh(np.divide(least, spread) - 1), nan=0.0)
    return [*found, float(gap > spread), float(least > spread), float(wide)]


REWARDBENCH2 = Benchmark(
    name="rewardbench2",
    about="mean over subsets of best of four, Ties by its own score (Malik et al. 2025, arXiv 2506.01937)",
    columns=("prompt", "chosen", "rejected"),
    is_row=lambda row: has_lists(row) and bool({"num_correct", "subset"} & row.keys()),
    task=_task,
    value=best_of_all,
    weights=equally,
    scores={TIES: ties_score},
)
