"""All benchmarks, and labelled pairs in any form that training reads. No JAX.

To add one: a module with a function from a row to its task and one from a judged task to its value (1 right, 0 wrong),
and its entry here.
"""

import numpy as np

from dpo_jax.data.comparison import Skip
from dpo_jax.judging.benchmarks.benchmark import Benchmark
from dpo_jax.judging.benchmarks.both_orders import JUDGEBENCH, LLMBAR
from dpo_jax.judging.benchmarks.rewardbench import REWARDBENCH
from dpo_jax.judging.benchmarks.rewardbench2 import REWARDBENCH2
from dpo_jax.judging.benchmarks.rm_bench import RM_BENCH
from dpo_jax.judging.tasks import JudgedTask


def half_for_ties(one: JudgedTask) -> float:
    """1 if the good one is better, 0.5 for a verdict of exactly 0; NaN, which leaves it out, without a verdict."""
    return float(np.sign(one.margins[0, 0]) + 1) / 2


PAIRS = "pairs"
LABELLED_PAIRS = Benchmark(
    name=PAIRS,
    about="share of pairs whose better answer the judge prefers, ties as halves; without a verdict left out",
    columns=(),
    is_row=lambda row: False,  # they are read by what reads training's
    task=lambda row, where: Skip("no_task"),
    value=half_for_ties,
)
# In the order in which a file's rows are tried.
BENCHMARKS: dict[str, Benchmark] = {
    one.name: one for one in (RM_BENCH, REWARDBENCH2, JUDGEBENCH, LLMBAR, REWARDBENCH, LABELLED_PAIRS)
}
