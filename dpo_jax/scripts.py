"""What an installation puts on the path: `dpo-jax-train` is `python -m dpo_jax.train`, and so on."""

import runpy
import sys
from pathlib import Path


def run_script() -> None:
    """Run the module that the script's own name tells."""
    name = Path(sys.argv[0]).stem.removeprefix("dpo-jax-")
    runpy.run_module(f"dpo_jax.{name}", run_name="__main__", alter_sys=True)
