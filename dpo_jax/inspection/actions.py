"""What `python -m dpo_jax.data` does: look at a config's data, or tokenise it ahead; no weights are needed."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dpo_jax.bucket.local import cache_root
from dpo_jax.config.settings import Settings
from dpo_jax.config.values import check_workdir
from dpo_jax.data.cache.shared import shared_address
from dpo_jax.data.prepare import Prepared, Progress, Reading
from dpo_jax.data.summary import field_lines, form_lines
from dpo_jax.errors import UserError, escaped
from dpo_jax.inspection.console import print_inspection, print_rows, say
from dpo_jax.inspection.gather import SHAPE_HEAD, Inspection, bad_rows, pair_examples, schedule_use
from dpo_jax.model.tuning import row_limits
from dpo_jax.report.html import write_page
from dpo_jax.report.sections import data_lengths, mixture_parts
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.training import inputs
from dpo_jax.weights.find import Policy, find_policy

LINE_SECONDS = 10.0  # between two lines about progress, where there is no terminal


def inspect_data(s: Settings, *, workdir: str, html: str, examples: int, shards: int, platform: str) -> None:
    """Show what `python -m dpo_jax.data inspect` was asked for, see its --help for the options."""
    micro = s.batch.microbatches
    inputs.check_division(s.batch, shards)
    policy, prepared, _ = _pairs(s, workdir)
    inputs.check_tokens(prepared.split, policy)
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
        report=prepared.report,
        schedule=use,
        note=note,
        examples=pair_examples(prepared, policy.tokenizer, examples),
    )
    print_inspection(shown, _console())
    if html:
        print(f"page {escaped(str(_write_page(s, shown, Path(html))))}")


def prepare_data(s: Settings, *, workdir: str) -> None:
    """Read and tokenise the data into the cache, and print what was read and where it is."""
    start, console = time.monotonic(), _console()
    policy, prepared, shared = _pairs(s, workdir)
    inputs.check_tokens(prepared.split, policy)
    print_rows(prepared.report, console)
    cache = prepared.train.cache
    size = sum(file.stat().st_size for file in Path(cache.directory).iterdir())
    place = f"{shared}/{Path(cache.directory).name} (copy in {cache.directory})" if shared else cache.directory
    made = f"built in {time.monotonic() - start:.1f} s" if prepared.built else "already there"
    say(console, f"cache {place}: {len(cache):,} pairs, {size / 1e6:,.1f} MB, {made}")


def _write_page(s: Settings, inspection: Inspection, path: Path) -> Path:
    """Write the inspection as one self-contained page, in the look of a run's report."""
    report = inspection.report
    mixture = "; ".join(mixture_parts(report))
    dataset = s.data.dataset if mixture else Path(s.data.dataset).name
    pairs = {name: entry["pairs"] for name, entry in report["splits"].items()}
    dropped = sum(sum(source["dropped"].values()) for source in report["sources"])
    return write_page(
        path,
        "inspection/templates/inspection.html",
        option="--html",
        title=f"Data: {dataset} for {Path(s.model).name}",
        counts=f"{pairs['train']:,} training pairs, {pairs['eval']:,} held out, {dropped:,} rows dropped",
        origin=(f"Mixture: {mixture}. " if mixture else "") + f"Evaluation: {report['held_out'].removesuffix('.')}.",
        report=report,
        lines=[*form_lines(report), *field_lines(report), *report["notes"]],
        bad=bad_rows(report),
        lengths=data_lengths(report),
        schedule=inspection.schedule,
        shape_head=SHAPE_HEAD,
        note=inspection.note,
        examples=inspection.examples,
    )


def _pairs(s: Settings, given: str) -> tuple[Policy, Prepared, str]:
    """The model's numbers and tokenizer, the pairs, and the address of the shared cache, if it is one."""
    workdir = check_workdir(given) if given else cache_root(s.data.cache_dir) / f"tiny-{s.seed}"
    quarantine = workdir / "quarantine.jsonl" if given else None
    if s.model == "tiny" or s.data.dataset == "synthetic":
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{workdir} cannot be written ({error.strerror}); give a writable --workdir") from error
    policy = find_policy(
        s.model, workdir, s.seed, with_weights=False, revision=s.revision, scalar_head=s.task == "reward"
    )
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
                read = f"read {reading.bytes / 1e6:,.1f} of {reading.total_bytes / 1e6:,.1f} MB"
                say(console, f"{read}: {reading.rows:,} rows, {reading.kept:,} kept")

        yield line
        return
    columns: list[Any] = [BarColumn(), DownloadColumn(), TextColumn("{task.fields[rows]}"), TimeRemainingColumn()]
    with Bar(*columns, console=console) as bar:

        def advance(reading: Reading) -> None:
            if not bar.tasks:
                bar.add_task("", total=reading.total_bytes, rows="")
            bar.update(bar.tasks[0].id, completed=reading.bytes, rows=f"{reading.rows:,} rows, {reading.kept:,} kept")

        yield advance


def _console() -> Console:
    """Standard output; wide where it is no terminal, so that a table's cells are not broken in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
