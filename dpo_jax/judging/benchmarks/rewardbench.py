"""RewardBench: pairs in four sections. No JAX.

Lambert et al. 2024, arXiv 2403.13787; sections and sizes in rewardbench/constants.py, the average of a section in
`calculate_scores_per_section` of rewardbench/utils.py, at github.com/allenai/reward-bench.
"""

from collections.abc import Mapping

from dpo_jax.data.comparison import Skip
from dpo_jax.judging.benchmarks.benchmark import Benchmark, ByPart, Row, all_above
from dpo_jax.judging.tasks import Task, text_task

# How many pairs each subset of a section has in the published average; PRM's 447 count as many as the code's 984.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}


def _task(row: Row, where: str) -> Task | Skip:
    if not (isinstance(row["chosen"], str) and isinstance(row["rejected"], str)):
        return Skip("not_text", "chosen and rejected must be texts")
    subset = str(row["subset"])
    return text_task(where, str(row.get("id", "")), subset, row["prompt"], [row["chosen"]], [row["rejected"]])


def section_weights(sizes: Mapping[str, int]) -> dict[str, float]:
    """Sections count equally, subsets within one by the published numbers; subsets of no section are left out.

    Where no subset is of a section, every pair counts equally.
    """
    weights: dict[str, float] = {}
    for counts in SECTIONS.values():
        there = {name: count for name, count in counts.items() if name in sizes}
        weights |= {name: count / sum(there.values()) for name, count in there.items()}
    return weights or dict(sizes)


def _sections(by_part: ByPart, scores: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for section, counts in SECTIONS.items():
        there = {name: count for name, count in counts.items() if name in scores}
        if there:
            found[section] = sum(scores[name] * count for name, count in there.items()) / sum(there.values())
    return found


REWARDBENCH = Benchmark(
    name="rewardbench",
    about="mean over sections, subsets by their published sizes (Lambert et al. 2024, arXiv 2403.13787)",
    columns=("prompt", "chosen", "rejected", "subset"),
    is_row=lambda row: {"prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model"} <= row.keys(),
    task=_task,
    value=all_above,
    weights=section_weights,
    more=_sections,
)
