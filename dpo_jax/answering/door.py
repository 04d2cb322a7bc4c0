"""What the commands that write lines have in common: from the command line to the exit code. No JAX of its own."""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from dpo_jax.entry import EntryPoint, run_entry_point
from dpo_jax.errors import UserError

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

    def read_and_do(entry: EntryPoint) -> None:
        request = parse(argv)
        if is_distributed is not None:
            entry.several = is_distributed(request) or _process_count() > 1
        if entry.several:  # first of all, as the others wait for this process
            from dpo_jax.parallel.processes import join

            join()
        do(request, entry.several)

    return run_entry_point(read_and_do)


def _process_count() -> int:
    said = os.environ.get("JAX_NUM_PROCESSES") or "1"
    if not (said.isascii() and said.isdigit()):
        raise UserError(f"JAX_NUM_PROCESSES={said!r} in the environment is no number of processes; mend or unset it")
    return int(said)
