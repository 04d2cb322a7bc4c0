"""RM-Bench: three styles of a right answer against three of a wrong one. No JAX.

Liu et al. 2024, arXiv 2410.16184; `compute_accuracy` in the README and scripts/utils.py of github.com/THU-KEG/RM-Bench.
"""

from collections.abc import Mapping

import numpy as np

from dpo_jax.data.comparison import Skip
from dpo_jax.judging.benchmarks.benchmark import Benchmark, ByPart, Row, are_texts, equally, has_lists
from dpo_jax.judging.tasks import JudgedTask, Task, text_task

_STYLES = 3  # concise, detailed, detailed with markdown


def _task(row: Row, where: str) -> Task | Skip:
    good, bad = row["chosen"], row["rejected"]
    if not (are_texts(good) and are_texts(bad)) or len(good) != _STYLES or len(bad) != _STYLES:
        return Skip("not_text", f"chosen and rejected must be lists of {_STYLES} texts")
    # safety-refuse and safety-response are one domain.
    domain = str(row["domain"]).partition("-")[0]
    return text_task(where, str(row.get("id", "")), domain, row["prompt"], good, bad)


def _difficulties(one: JudgedTask) -> tuple[float, float, float]:
    """Shares of the comparisons that are right: chosen in a fancier style than rejected, in the same, in a plainer."""
    right = (one.margins > 0).astype(np.float64)
    pick = lambda side: float(right[side].mean())
    return pick(np.tril_indices(_STYLES, -1)), pick(np.diag_indices(_STYLES)), pick(np.triu_indices(_STYLES, 1))


def style_matrix(one: JudgedTask) -> float:
    """The mean of the shares that are right at the three difficulties, easy, normal and hard, which count equally."""
    return sum(_difficulties(one)) / 3


def _by_difficulty(by_part: ByPart, scores: Mapping[str, float]) -> dict[str, float]:
    """Means over domains, as the published ones are."""
    each = np.array([np.mean([_difficulties(one) for one in part], axis=0) for part in by_part.values()])
    return dict(zip(("easy", "normal", "hard"), each.mean(0).tolist(), strict=True))


RM_BENCH = Benchmark(
    name="rm-bench",
    about="mean over domains of the mean of easy, normal and hard accuracy (Liu et al. 2024, arXiv 2410.16184)",
    columns=("prompt", "chosen", "rejected", "domain"),
    is_row=lambda row: has_lists(row) and "domain" in row and len(row["chosen"]) == _STYLES,
    task=_task,
    value=style_matrix,
    weights=equally,
    more=_by_difficulty,
)
