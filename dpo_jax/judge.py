"""Judge answers: `python -m dpo_jax.judge compare A.jsonl B.jsonl --judge=J`, `benchmark FILE|NAME`, `score A.jsonl`.

Exit codes (docs/judging.md): 0 done; 2 bad input, one line on standard error; 74 the disk is full; 130 interrupted.
After all but 2 the same command goes on with the file that --out names.
"""

import sys
from collections.abc import Sequence

from dpo_jax.answering.door import run_command
from dpo_jax.entry import exit_within_a_limit
from dpo_jax.judging.flags import JudgeRequest, parse_judging


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(sys.argv if argv is None else argv, parse_judging, _judge)


def _judge(request: JudgeRequest, several: bool) -> None:
    from dpo_jax.judging.run import RUNS

    RUNS[request.command](request)


if __name__ == "__main__":
    exit_within_a_limit(main)
