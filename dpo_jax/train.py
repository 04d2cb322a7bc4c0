"""Train a policy on preferences: `python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR`.

Exit codes (docs/faults.md): 0 done; 2 bad input, one line on standard error, before anything is compiled; 65 more than
`max_bad_steps` updates in a row were not finite; 70 nothing moved for `stuck_after_seconds`, or another process is
gone; 74 a checkpoint could not be saved, or the disk is full; 143 stopped by SIGTERM after saving (a second SIGTERM
ends the process at once). After 70, 74 and 143 the same command resumes the run.
"""

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.config.check import check
from dpo_jax.config.command_line import Given, parse
from dpo_jax.config.saved import claim_workdir
from dpo_jax.config.settings import check_paths, read_settings
from dpo_jax.config.stages import has_stages
from dpo_jax.config.values import check_workdir
from dpo_jax.errors import SAVE_FAILED, SIGTERM, Stopped, UserError
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
      Stopped: SIGTERM came; the state is saved and the same call resumes it.
    """
    directory, keys = check_workdir(workdir), dict(config)
    check(keys)
    if has_stages(keys):
        raise UserError("task=rlhf is several runs, one after the other: python -m dpo_jax.rlhf makes them")
    settings = read_settings(keys)
    check_packages(settings.trackers)
    check_paths(settings)
    claim_workdir(directory, keys, write=False)
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
    distributed, workdir = False, Path()
    try:
        given = read()
        distributed, workdir = given.distributed, given.workdir
        if distributed:  # first of all, as the others wait for this process
            from dpo_jax.parallel.processes import join

            join()
        train(given)
    except Stopped:
        print("stopped by SIGTERM; everything is saved, the same command resumes the run", file=sys.stderr)
        return SIGTERM
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return _leave(e.code, distributed)
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = "the checkpoints that are there are kept: make room, then the same command resumes from the newest"
            print(f"error: {e.filename or workdir}: {e.strerror}; {kept}", file=sys.stderr, flush=True)
            return _leave(SAVE_FAILED, distributed)
        if distributed:
            from dpo_jax.parallel.processes import end_if_a_peer_is_gone

            end_if_a_peer_is_gone(e)
        _leave(1, distributed)
        raise
    return 0


def _leave(code: int, distributed: bool) -> int:
    """The exit code; of one of several processes, which would wait for the others, it is the end soon."""
    if not distributed:
        return code
    from dpo_jax.parallel.processes import leave

    return leave(code)


if __name__ == "__main__":
    sys.exit(main())
