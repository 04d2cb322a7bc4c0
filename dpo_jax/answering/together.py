"""Several processes answer together: the first one writes, and all know where it goes on."""

import datetime
from collections.abc import Callable

import numpy as np

from dpo_jax.answering.output import Output
from dpo_jax.parallel.mesh import from_first
from dpo_jax.training.workdir import first_only


def by_the_first(open_it: Callable[[], Output]) -> tuple[Output | None, int]:
    """What the first process has opened (None in the others), and how many prompts are answered in it.

    Raises:
      UserError: in all processes, where the first one refuses.
    """
    held: list[Output] = []
    first_only(lambda: held.append(open_it()))
    return (held[0] if held else None), the_firsts_number(held[0].done if held else 0)


def the_firsts_day(day: str) -> str:
    """The first process's day (YYYY-MM-DD), in all."""
    return datetime.date.fromordinal(the_firsts_number(datetime.date.fromisoformat(day).toordinal())).isoformat()


def the_firsts_number(number: int) -> int:
    """The first process's number, below 2^31, in all."""
    return int(from_first(np.asarray(number, np.int32)))
