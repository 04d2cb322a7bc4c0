"""`python -m dpo_jax.plan`."""

from dpo_jax.entry import exit_within_a_limit
from dpo_jax.plan.command import main

if __name__ == "__main__":
    exit_within_a_limit(main)
