"""Several processes answer together: the first one writes, and all know where it goes on."""

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
    done = int(from_first(np.asarray(held[0].done if held else 0, np.int32)))
    return (held[0] if held else None), done
