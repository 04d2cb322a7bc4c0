"""`python -m dpo_jax.data inspect` and `prepare`: look at a config's data, or tokenise it ahead; no weights needed.

What takes seconds to import (JAX, transformers, grain) is imported when the command line is checked.
"""

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dpo_jax.config.command_line import Command, read_flags
from dpo_jax.config.paths import check_paths
from dpo_jax.config.settings import Settings, read_settings
from dpo_jax.config.values import check_workdir
from dpo_jax.data.cache.shared import shared_address
from dpo_jax.data.cache.store import cache_root
from dpo_jax.data.prepare import Prepared, Progress, Reading
from dpo_jax.errors import UserError
from dpo_jax.inspection.console import print_inspection, print_rows, say
from dpo_jax.inspection.page import write_inspection

if TYPE_CHECKING:
    from dpo_jax.weights.find import Policy

LINE_SECONDS = 10.0  # between two lines about progress, where there is no terminal
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
    program, *rest = sys.argv if argv is None else argv
    try:
        if not rest or rest[0] in ("--help", "-h", "--helpfull"):
            usages = "\n".join(command.usage for command in COMMANDS.values())
            if not rest:
                raise UserError(f"a command is missing; use {' or '.join(COMMANDS)} (--help says more)")
            print(f"usage:\n{usages}\n\nEvery key, its unit and its default: configs/common.py.")
            return 0
        name, *rest = rest
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}; use {' or '.join(COMMANDS)}")
        config, options = read_flags([program, *rest], COMMANDS[name])
        check_paths(config)
        (_inspect if name == "inspect" else _prepare)(read_settings(config), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _inspect(s: Settings, options: Mapping[str, Any]) -> None:
    from dpo_jax.inspection.gather import Inspection, pair_examples, schedule_use
    from dpo_jax.model.tuning import row_limits
    from dpo_jax.rows.schedule import make_schedule
    from dpo_jax.training import inputs

    shards, micro, platform = options["shards"], s.batch.microbatches, options["platform"]
    inputs.check_division(s.batch, shards)
    policy, prepared, _ = _pairs(s, options["workdir"])
    where = f"{s.batch.size} pairs a step over {shards} data shards x {micro} microbatches ({platform})"
    use, note = None, ""
    try:
        inputs.check_enough(s.batch, len(prepared.train))
        limits = row_limits(policy.config, shards * micro, platform)
        schedule = make_schedule(prepared.train, s.batch.size, limits, s.batch.order, prepared.split.mixture)
    except UserError as error:  # what there is can still be looked at
        note = f"no schedule: {error}"
    else:
        use = schedule_use(schedule, where, inputs.run_steps(s, schedule.steps_per_epoch))
    shown = Inspection(
        dataset=s.data.dataset,
        model=s.model,
        report=prepared.report,
        lengths=prepared.train.lengths,
        schedule=use,
        note=note,
        examples=pair_examples(prepared, policy.tokenizer, options["examples"]),
    )
    print_inspection(shown, _console())
    if options["html"]:
        print(f"page {write_inspection(shown, Path(options['html']))}")


def _prepare(s: Settings, options: Mapping[str, Any]) -> None:
    start, console = time.monotonic(), _console()
    _, prepared, shared = _pairs(s, options["workdir"])
    print_rows(prepared.report, console)
    cache = prepared.train.cache
    size = sum(file.stat().st_size for file in Path(cache.directory).iterdir())
    place = f"{shared}/{Path(cache.directory).name} (copy in {cache.directory})" if shared else cache.directory
    made = f"built in {time.monotonic() - start:.1f} s" if prepared.built else "already there"
    say(console, f"cache {place}: {len(cache):,} pairs, {size / 1e6:,.1f} MB, {made}")


def _pairs(s: Settings, given: str) -> "tuple[Policy, Prepared, str]":
    """The model's numbers and tokenizer, the pairs, and the address of the shared cache, if it is one."""
    from dpo_jax.training import inputs
    from dpo_jax.weights.find import find_policy

    workdir = Path(check_workdir(given)) if given else cache_root(s.data.cache_dir) / f"tiny-{s.seed}"
    quarantine = workdir / "quarantine.jsonl" if given else None
    if s.model == "tiny" or s.data.dataset == "synthetic":
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{workdir} cannot be written ({error.strerror}); give a writable --workdir") from error
    policy = find_policy(s.model, workdir, s.seed, with_weights=False)
    with _progress(Console(stderr=True)) as progress:
        prepared = inputs.prepare_pairs(s, policy.tokenizer, workdir, quarantine, progress)
    return policy, prepared, shared_address(s.data.cache_dir)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar on a terminal, elsewhere a line now and then; nothing if nothing is built."""
    if not console.is_terminal:
        last_line = time.monotonic()

        def line(reading: Reading) -> None:
            nonlocal last_line
            if time.monotonic() - last_line >= LINE_SECONDS:
                last_line = time.monotonic()
                say(console, _words(reading))

        yield line
        return
    columns: list[Any] = [BarColumn(), DownloadColumn(), TextColumn("{task.fields[rows]}"), TimeRemainingColumn()]
    with Bar(*columns, console=console) as bar:

        def advance(reading: Reading) -> None:
            if not bar.tasks:
                bar.add_task("", total=reading.total_bytes, rows="")
            bar.update(bar.tasks[0].id, completed=reading.bytes, rows=f"{reading.rows:,} rows, {reading.kept:,} kept")

        yield advance


def _words(reading: Reading) -> str:
    return (
        f"read {reading.bytes / 1e6:,.1f} of {reading.total_bytes / 1e6:,.1f} MB: {reading.rows:,} rows, "
        f"{reading.kept:,} kept"
    )


def _console() -> Console:
    """Standard output; wide where it is no terminal, so that a table's cells are not broken in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _platform() -> str:
    """Where JAX would run here, without waking it: on a TPU another process may be training."""
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named:
        return "gpu" if named in ("cuda", "rocm") else named if named in ("cpu", "gpu") else "tpu"
    return "tpu" if importlib.util.find_spec("libtpu") else "cpu"
