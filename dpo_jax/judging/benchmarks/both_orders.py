"""JudgeBench and LLMBar: pairs that are judged in both orders, which count apart. No JAX.

JudgeBench: Tan et al. 2024, arXiv 2410.12784; `compute_final_metrics` in utils/metrics.py and the categories of
run_judge.py at github.com/ScalerLab/JudgeBench. LLMBar: Zeng et al. 2023, arXiv 2310.07641; the end of
LLMEvaluator/evaluate.py at github.com/princeton-nlp/LLMBar.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dpo_jax.data.comparison import Skip
from dpo_jax.judging.benchmarks.benchmark import Benchmark, ByPart, Row, are_texts
from dpo_jax.judging.tasks import JudgedTask, Task, text_task

_CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


def _judgebench(row: Row, where: str) -> Task | Skip:
    answers = [row["response_A"], row["response_B"]]
    if not are_texts(answers):
        return Skip("not_text", "response_A and response_B must be texts")
    if row["label"] not in ("A>B", "B>A"):
        return Skip("bad_label", f"label is {row['label']!r:.40}; needed is A>B or B>A")
    source, first = str(row.get("source") or "all"), row["label"] == "A>B"
    part = next((name for start, name in _CATEGORIES.items() if source.startswith(start)), source)
    good, bad = answers if first else answers[::-1]
    return replace(text_task(where, str(row["pair_id"]), part, row["question"], [good], [bad]), good_first=first)


def both_games(one: JudgedTask) -> float:
    """1 if over both orders more verdicts are right than wrong, so a right one and a tie are enough; else 0."""
    signs = np.sign(one.orders[:, 0, 0])
    return float(np.nansum(signs) > 0)


def _order_figures(by_part: ByPart, scores: Mapping[str, float]) -> dict[str, float]:
    signs = np.array([np.sign(one.orders[:, 0, 0]) for part in by_part.values() for one in part])
    first = np.array([one.task.good_first for part in by_part.values() for one in part])
    as_given = np.where(first, signs[:, 0], signs[:, 1])
    exchanged = np.where(first, signs[:, 1], signs[:, 0])
    right = lambda side: float(np.mean((side > 0) + (side == 0) / 2))
    return {
        "order_as_given": right(as_given),
        "order_exchanged": right(exchanged),
        "both_right": float(np.mean((signs > 0).all(1))),
        "agreement": float(np.mean(signs[:, 0] == signs[:, 1])),
    }


def _llmbar(row: Row, where: str) -> Task | Skip:
    answers = [row["output_1"], row["output_2"]]
    if not are_texts(answers):
        return Skip("not_text", "output_1 and output_2 must be texts")
    if str(row["label"]) not in ("1", "2"):
        return Skip("bad_label", f"label is {row['label']!r:.40}; needed is 1 or 2")
    first = str(row["label"]) == "1"
    good, bad = answers if first else answers[::-1]
    part = where.rpartition(":")[0].replace("\\", "/").split("/")[-2:-1]  # a directory for each of its five sets
    task = text_task(where, str(row.get("id", "")), part[0] if part else "all", row["input"], [good], [bad])
    return replace(task, good_first=first)


def mean_of_orders(one: JudgedTask) -> float:
    """The share of both orders that is right; a verdict of exactly 0 is half right, as their ratings that tie are."""
    signs = np.sign(one.orders[:, 0, 0])
    return float(np.mean((signs > 0) + (signs == 0) / 2))


JUDGEBENCH = Benchmark(
    name="judgebench",
    about="pairs with more right than wrong verdicts over both orders (Tan et al. 2024, arXiv 2410.12784)",
    columns=("pair_id", "question", "response_A", "response_B", "label"),
    is_row=lambda row: {"pair_id", "question", "response_A", "response_B", "label"} <= row.keys(),
    task=_judgebench,
    value=both_games,
    more=_order_figures,
)
LLMBAR = Benchmark(
    name="llmbar",
    about="mean accuracy of the two orders (Zeng et al. 2023, arXiv 2310.07641)",
    columns=("input", "output_1", "output_2", "label"),
    is_row=lambda row: {"input", "output_1", "output_2", "label"} <= row.keys(),
    task=_llmbar,
    value=mean_of_orders,
    more=_order_figures,
)
