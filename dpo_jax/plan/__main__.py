"""`python -m dpo_jax.plan`."""

import sys

from dpo_jax.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
