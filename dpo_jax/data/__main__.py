"""`python -m dpo_jax.data inspect` and `prepare`."""

import sys

from dpo_jax.inspection.command import main

if __name__ == "__main__":
    sys.exit(main())
