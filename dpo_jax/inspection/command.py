"""`python -m dpo_jax.data inspect` and `prepare`: the command line."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from absl import flags

from dpo_jax.config.command_line import Command, read_flags
from dpo_jax.config.settings import check_paths, read_settings
from dpo_jax.entry import EntryPoint, run_entry_point
from dpo_jax.errors import UserError

_USAGE = "python -m dpo_jax.data {} --config=configs/hhh.py[:PRESET] [--config.KEY=VALUE ...]"


def _common_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Where quarantine.jsonl goes (default: the cache).", flag_values=values)


def _inspect_flags(values: flags.FlagValues) -> None:
    _common_flags(values)
    flags.DEFINE_string("html", "", "Write a page.", flag_values=values)
    flags.DEFINE_integer("examples", 3, "Pairs shown.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("shards", 1, "Data shards that share the rows.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("platform", _platform(), ["cpu", "gpu", "tpu"], "Where it would run.", flag_values=values)


COMMANDS = {
    "inspect": Command(
        _USAGE.format("inspect") + " [--html=FILE] [--examples=N] [--shards=N] [--platform=NAME] [--workdir=DIR]",
        "Shows rows read, kept and dropped, lengths, the schedule of row shapes, and pairs as the model sees them.\n"
        "  --html=FILE      write it as a page, with histograms\n"
        "  --examples=N     pairs shown, spread over the files (3)\n"
        "  --shards=N       devices that share the rows: mesh_data x mesh_fsdp (1)\n"
        "  --platform=NAME  cpu, gpu or tpu, where it would run (this machine's)\n"
        "  --workdir=DIR    a run's directory, for its quarantine.jsonl (default: it stays in the cache)",
        _inspect_flags,
    ),
    "prepare": Command(
        _USAGE.format("prepare") + " [--workdir=DIR]",
        "Reads and tokenises the data into the cache ahead of training: --config.cache_dir=DIR or gs://bucket/dir.\n"
        "  --workdir=DIR    a run's directory, for its quarantine.jsonl (default: it stays in the cache)",
        _common_flags,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for what the user can mend."""
    given = sys.argv if argv is None else argv

    def do(entry: EntryPoint) -> None:
        entry.afterwards = "pairs that are in the cache stay there"
        _run(*given)

    return run_entry_point(do)


def _run(program: str, *rest: str) -> None:
    if not rest or rest[0] in ("--help", "-h", "--helpfull"):
        usages = "\n".join(command.usage for command in COMMANDS.values())
        if not rest:
            raise UserError(f"a command is missing; use {' or '.join(COMMANDS)} (--help says more)")
        print(f"usage:\n{usages}\n\n`inspect --help` lists every key of the config.")
        return
    name, *arguments = rest
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; use {' or '.join(COMMANDS)}")
    config, options = read_flags([program, *arguments], COMMANDS[name])
    settings = read_settings(config)
    check_paths(settings)
    from dpo_jax.inspection import actions  # takes seconds: JAX, transformers, grain

    (actions.inspect_data if name == "inspect" else actions.prepare_data)(settings, **options)


def _platform() -> str:
    """Where JAX would run here, without waking it: on a TPU another process may be training."""
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named:
        return "gpu" if named in ("cuda", "rocm") else named if named in ("cpu", "gpu") else "tpu"
    return "tpu" if importlib.util.find_spec("libtpu") else "cpu"
