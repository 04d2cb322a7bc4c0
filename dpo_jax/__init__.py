"""Direct Preference Optimization on TPUs: one jitted step, shared prompts, packed pairs."""

import os

# transformers is asked for tokenizers and configs only; without torch it would say so at every start.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip

__all__ = ["Comparison", "LabeledComparison", "Skip"]
