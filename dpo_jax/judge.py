"""Judge answers: `python -m dpo_jax.judge compare A.jsonl B.jsonl --judge=J`, `benchmark FILE|NAME`, `score A.jsonl`.

Exit codes (docs/judging.md): 0 done; 2 bad input, one line on standard error; 74 the disk is full; 130 interrupted.
After all but 2 the same command goes on with the file that --out names.
"""

import errno
import os
import sys
from collections.abc import Sequence

from dpo_jax.answering.output import tell
from dpo_jax.errors import SAVE_FAILED, UserError
from dpo_jax.judging.flags import parse_judging

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        request = parse_judging(sys.argv if argv is None else argv)
        from dpo_jax.judging.run import RUNS

        RUNS[request.command](request)
    except KeyboardInterrupt:
        tell("interrupted; what is written stays, and the same command resumes it")
        return INTERRUPTED
    except UserError as error:
        tell(f"error: {error}")
        cause = error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return SAVE_FAILED if full else error.code
    except BrokenPipeError:  # whoever read the table has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
