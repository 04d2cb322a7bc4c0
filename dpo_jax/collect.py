"""Collect preferences on the policy's own answers: `python -m dpo_jax.collect --policy=P --prompts=FILE --judge=J`.

Exit codes (docs/collecting.md): 0 done; 2 bad input, one line on standard error; 70 another process is gone; 74 the
disk is full; 130 interrupted. After all but 2 the same command resumes the file.
"""

import sys
from collections.abc import Sequence

from dpo_jax.answering.door import run_command
from dpo_jax.collecting.flags import CollectRequest, parse_collecting
from dpo_jax.entry import exit_within_a_limit


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = sys.argv if argv is None else argv
    return run_command(given, parse_collecting, _collect, lambda request: request.answering.distributed)


def _collect(request: CollectRequest, several: bool) -> None:
    from dpo_jax.collecting.run import collect

    collect(request, several)


if __name__ == "__main__":
    exit_within_a_limit(main)
