"""Train a policy on preferences: `python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR`.

Exit codes (docs/faults.md): 0 done; 2 bad input, one line on standard error, before anything is compiled; 65 more than
`max_bad_steps` updates in a row were not finite; 70 nothing moved for `stuck_after_seconds`, or another process is
gone; 74 a checkpoint could not be saved, or a file could not be written; 129, 130 and 143 stopped by SIGHUP, Ctrl-C or
SIGTERM after saving (a second one ends the process at once). After all but 2 and 65 the same command resumes the run.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.config.check import check
from dpo_jax.config.command_line import Given, parse
from dpo_jax.config.saved import claim_workdir
from dpo_jax.config.settings import check_paths, read_settings
from dpo_jax.config.stages import has_stages
from dpo_jax.config.values import check_workdir
from dpo_jax.entry import EntryPoint, exit_within_a_limit, run_entry_point
from dpo_jax.errors import UserError
from dpo_jax.records.trackers import check_packages


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Run one config to its end in `workdir`, or resume the run that is there.

    Args:
      config: its keys, such as `dpo_jax.get_config("configs/hhh.py:tiny")`.
      workdir: the run's directory.

    Returns:
      The held-out metrics at the end (where nothing is held out: the last training record).

    Raises:
      UserError: bad input, in one line.
      Stopped: a signal came; the state is saved and the same call resumes it.
    """
    directory, keys = check_workdir(workdir), dict(config)
    check(keys)
    if has_stages(keys):
        raise UserError("task=rlhf is several runs, one after the other: python -m dpo_jax.rlhf makes them")
    settings = read_settings(keys)
    check_packages(settings.trackers)
    check_paths(settings)
    claim_workdir(directory, keys, write=False, checkpoints=False)
    # All that is quick to refuse is refused: what follows takes seconds to import.
    from dpo_jax.training.run import train_policy

    if settings.task != "rl":
        return train_policy(settings, directory)
    from dpo_jax.rl.phase import params_after_rl

    return train_policy(settings, directory, params_after_rl)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = sys.argv if argv is None else argv
    return guarded(lambda: parse(arguments), lambda given: run(given.config, given.workdir))


def guarded(read: Callable[[], Given], train: Callable[[Given], object]) -> int:
    """Read a command line and train what it asks for; whatever ends it becomes a line and an exit code."""

    def read_and_train(entry: EntryPoint) -> None:
        entry.afterwards = "checkpoints that are there are kept, and the same command resumes the run"
        given = read()
        entry.place, entry.needs_output = given.workdir, False
        if given.distributed:  # first of all, as the others wait for this process
            from dpo_jax.parallel.processes import join

            entry.several = True
            join(given.coordinator_bind, given.stuck_after)
        train(given)

    return run_entry_point(read_and_train)


if __name__ == "__main__":
    exit_within_a_limit(main)
