"""RLHF in one command: `python -m dpo_jax.rlhf --config=configs/rlhf.py[:PRESET] --workdir=DIR [--stages=rl]`.

SFT, a reward model and RL against it, one after the other (docs/rlhf.md); each is a run, in DIR/sft, DIR/reward and
DIR/rl. The same command goes on where it was stopped, and does nothing again that is done. Exit codes are those of
`python -m dpo_jax.train`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax import train
from dpo_jax.config.check import check
from dpo_jax.config.command_line import RLHF, parse
from dpo_jax.config.saved import claim_workdir
from dpo_jax.config.settings import check_paths, read_settings
from dpo_jax.config.stages import chosen_stages, read_stages
from dpo_jax.config.values import check_workdir
from dpo_jax.disk import read_json
from dpo_jax.entry import exit_within_a_limit
from dpo_jax.records.trackers import check_packages


def run(config: Mapping[str, Any], workdir: str | os.PathLike[str], stages: str = "") -> dict[str, Any]:
    """Run the stages of a config with task=rlhf in `workdir`, or go on with them.

    Args:
      config: its keys, such as `dpo_jax.get_config("configs/rlhf.py:tiny")`.
      workdir: the directory of all stages.
      stages: names with commas between; empty is all.

    Returns:
      What came of it, as result.json has it; {} before there was RL.

    Raises:
      UserError: bad input, in one line.
      Stopped: a signal came; the state is saved and the same call goes on.
    """
    directory, keys = check_workdir(workdir), dict(config)
    check(keys)
    found = read_stages(keys, directory.absolute())
    wanted = chosen_stages(found, stages)
    for stage in found:
        settings = read_settings(stage.config)
        check_packages(settings.trackers)
        if not stage.made_of:
            check_paths(settings)
    claim_workdir(directory, keys, write=True)
    from dpo_jax.rl.pipeline import RESULT, run_stages  # takes seconds to import

    run_stages(wanted, directory, train.run, lambda line: print(line, flush=True))
    return read_json(directory / RESULT) if (directory / RESULT).is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = sys.argv if argv is None else argv
    return train.guarded(lambda: parse(arguments, RLHF), lambda given: run(given.config, given.workdir, given.stages))


if __name__ == "__main__":
    exit_within_a_limit(main)
