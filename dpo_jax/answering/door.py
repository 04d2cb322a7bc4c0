"""What the commands that write lines have in common: from the command line to the exit code. No JAX of its own."""

import errno
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from dpo_jax.answering.output import tell
from dpo_jax.errors import SAVE_FAILED, UserError

INTERRUPTED = 130
R = TypeVar("R")


def run_command(
    argv: Sequence[str],
    parse: Callable[[Sequence[str]], R],
    do: Callable[[R, bool], None],
    is_distributed: Callable[[R], bool] | None = None,
) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 70, 74 or 130 (docs/sampling.md).

    Args:
      parse: of the command line, the request.
      do: of the request, the work; it is told whether this is one process of several.
      is_distributed: whether the request says so, beside JAX_NUM_PROCESSES; None: it is never one of several.
    """
    several = False
    try:
        request = parse(argv)
        if is_distributed is not None:
            several = is_distributed(request) or int(os.environ.get("JAX_NUM_PROCESSES") or 1) > 1
        if several:  # first of all, as the others wait for this process
            from dpo_jax.parallel.processes import join

            join()
        do(request, several)
    except KeyboardInterrupt:
        tell("interrupted; what is written stays, and the same command resumes it")
        return INTERRUPTED
    except UserError as e:
        tell(f"error: {e}")
        full = isinstance(e.__cause__, OSError) and e.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
        return _leave(SAVE_FAILED if full else e.code, several)
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as e:
        if several:
            from dpo_jax.parallel.processes import end_if_a_peer_is_gone

            end_if_a_peer_is_gone(e)
        _leave(1, several)
        raise
    return 0


def _leave(code: int, several: bool) -> int:
    """The exit code; of one of several processes, which would wait for the others, it is the end soon."""
    if not several:
        return code
    from dpo_jax.parallel.processes import leave

    return leave(code)
