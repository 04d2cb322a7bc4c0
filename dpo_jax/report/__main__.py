"""`python -m dpo_jax.report`."""

import sys

from dpo_jax.report.command import main

if __name__ == "__main__":
    sys.exit(main())
