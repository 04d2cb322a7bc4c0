"""Direct Preference Optimization on TPUs: one jitted step, shared prompts, packed pairs."""

from dpo_jax.data.preference import Comparison, LabeledComparison, Skip

__all__ = ["Comparison", "LabeledComparison", "Skip"]
