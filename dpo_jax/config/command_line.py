"""The command line of everything that takes a config: `--config=FILE.py[:PRESET] [--config.KEY=VALUE ...]` and flags.

Without JAX, so that `--help` and a refusal take no longer than Python takes to start.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dpo_jax.config.check import check, unknown_key
from dpo_jax.config.file import get_config
from dpo_jax.config.keys import KEYS, describe
from dpo_jax.config.values import check_numbers, check_workdir
from dpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line with a config: how it is used, what its help adds, and its flags beside --config."""

    usage: str
    about: str
    define: Callable[[flags.FlagValues], None]


def _train_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Directory of the run; the same command continues it.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "One process of several: join the others first.", flag_values=values)


TRAIN = Command(
    "python -m dpo_jax.train --config=configs/hhh.py[:PRESET] --workdir=DIR [--config.KEY=VALUE ...] [--distributed]",
    "--workdir is the directory of the run; the same command continues it. --distributed: this is one process of\n"
    "several, which waits for the others.",
    _train_flags,
)


def _rlhf_flags(values: flags.FlagValues) -> None:
    _train_flags(values)
    flags.DEFINE_string("stages", "", "Stages to run, with commas between; empty is all.", flag_values=values)


RLHF = Command(
    "python -m dpo_jax.rlhf --config=configs/rlhf.py[:PRESET] --workdir=DIR [--stages=sft,reward,rl] "
    "[--config.KEY=VALUE ...] [--distributed]",
    "--workdir is the directory of all stages; the same command goes on with them. --stages: only these, where what\n"
    "they are made of is there. --distributed: this is one process of several, which waits for the others.",
    _rlhf_flags,
)


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command line asks to be trained: a checked config, where, and whether this is one process of several.

    Of the config, what joining the others needs: `coordinator_bind`, where the first of several processes listens, and
    `stuck_after`, in seconds.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    distributed: bool
    stages: str
    coordinator_bind: str
    stuck_after: float


def parse(argv: Sequence[str], command: Command = TRAIN) -> Given:
    """What is to be trained, by a command line of `TRAIN` or `RLHF`; raises as `read_flags`."""
    config, values = read_flags(argv, command)
    if not values["workdir"]:
        raise UserError(f"--workdir is missing; usage: {command.usage}")
    workdir = check_workdir(values["workdir"])
    distributed, stages = values["distributed"], values.get("stages", "")
    return Given(config, workdir, distributed, stages, config["coordinator_bind"], config["stuck_after_seconds"])


def read_flags(argv: Sequence[str], command: Command) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """The checked config, and the values of this command's other flags by name.

    Raises:
      UserError: anything wrong with the command line, in one line.
      SystemExit: 0 after `--help`.
    """
    if any(a in ("--help", "-h", "--helpfull") for a in argv[1:]):
        print(f"usage: {command.usage}\n\n{command.about}\n\n{describe()}")
        raise SystemExit(0)
    files = [a for a in argv if a.startswith("--config=")]
    if not files:
        raise UserError(f"--config is missing; usage: {command.usage}")
    config = get_config(files[-1].removeprefix("--config="))
    given = [a for a in argv if a not in files]
    check_numbers(
        given, lambda name: (key := KEYS.get(name.removeprefix("config."))) is not None and key.type in (int, float)
    )
    for argument in given:
        override = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if override and override[1] not in config:
            raise unknown_key(override[1])
    values = flags.FlagValues()  # not absl's own registry, which holds the flags of every library that is imported
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=given)
        command.define(values)
        _, *rest = values(given)
    except (flags.Error, ValueError, TypeError) as e:
        raise UserError(" ".join(str(e).split())) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; usage: {command.usage}")
    check(config)
    return config, {name: values[name].value for name in values if name.split(".")[0] != "config"}
