"""What a run says about itself while it runs: metrics.jsonl, TensorBoard events, the console.

`metrics.jsonl` is the truth: one strict JSON object a line, appended and flushed, so a killed run loses at most a line
that was half written. JSON has no NaN and no infinity, so a number that is not finite is written as `null` (readers
treat it as missing; the console still shows `nan`). TensorBoard's events are a copy, and are made anew from it whenever
a run is opened again.
"""

import json
import math
import numbers
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from dpo_jax.errors import UserError
from dpo_jax.records.tensorboard import add_event, open_events

Record = dict[str, Any]
FLUSH_SECONDS = 10  # between flushes of TensorBoard's events
EVENTS = "events.jsonl"  # skipped updates and loss spikes, with the pairs of their batches

# How a metric is written for a person; anything not listed gets four significant digits.
FORMATS = {
    "loss": ".4f",
    "dpo_loss": ".4f",
    "accuracy": ".3f",
    "margin": ".4f",
    "chosen_reward": ".4f",
    "rejected_reward": ".4f",
    "chosen_logp": ".2f",
    "rejected_logp": ".2f",
    "learning_rate": ".2e",
    "pairs_per_second": ".1f",
    "step_seconds": ".3f",
    "useful_token_fraction": ".3f",
    "memory_gb": ".2f",
    "length_correlation": ".3f",
    "kl": ".3f",
    "kl_error": ".3f",
    "kl_per_token": ".4f",
}
# What a console line shows, in this order, with the console's shorter names.
LINE = {
    "loss": "loss",
    "dpo_loss": "dpo_loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "chosen_reward": "chosen",
    "rejected_reward": "rejected",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}
HELD_OUT = (
    "dpo_loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "kl",
    "kl_per_token", "length_correlation",
)  # fmt: skip


def show(name: str, value: float | None) -> str:
    """A metric's value for a person: `show("dpo_loss", 0.69315)` is "0.6931"."""
    if value is None or not math.isfinite(value):
        return "nan"
    return format(value, FORMATS.get(name.partition("/")[0], ".4g"))  # accuracy/SOURCE is an accuracy


def printable(text: str) -> str:
    """Make control characters visible: a model's answer may hold escape codes that would drive the terminal."""
    return "".join(
        c if c in "\n\t" or 32 <= ord(c) < 127 or ord(c) >= 160 else chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd"
        for c in text
    )


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line.strip()]


def read(path: Path) -> list[Record]:
    """All records of a JSON-lines file; none if it is missing; a half-written last line is left out.

    Raises:
      UserError: a line before the last is not a JSON object, which no interrupted write explains.
    """
    if not path.exists():
        return []
    lines = _lines(path)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path} line {number} is not a JSON object; remove the line, or restore the file")
    return records


def truncate(path: Path, keep: Callable[[Record], bool]) -> None:
    """Rewrite a JSON-lines file to the records for which `keep` is true, at once or not at all.

    For resuming: what was written after the checkpoint will be written again. A half-written last line goes too, so
    that the next append starts on a line of its own. A missing file stays missing.
    """
    if not path.exists():
        return
    # The lines as they stand: only a half-written last one has no record.
    kept = [line for line, record in zip(_lines(path), read(path), strict=False) if keep(record)]
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def before_after(records: Iterable[Record]) -> list[tuple[str, float | None, float | None]]:
    """The held-out metrics at step 0 and at the last evaluation after it: (name, before, after); None if not there.

    An accuracy of 0 before training is None too: the policy is its own reference, every pair ties and none is won.
    """
    evals = {record.get("step", 0): record for record in records if record.get("split") == "eval"}
    before = evals.pop(0, {})
    after = evals[max(evals)] if evals else {}
    by_source = sorted(name for name in {**before, **after} if name.startswith(("accuracy/", "margin/")))
    names = [name for name in HELD_OUT if name in before or name in after]
    tied = {name for name, value in before.items() if name.startswith("accuracy") and not value}
    return [(name, None if name in tied else before.get(name), after.get(name)) for name in (*names, *by_source)]


class Throughput:
    """Pairs per second and seconds per step since the last record, without the time spent in `paused`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._start = self._clock()
        self._steps = 0
        self._pairs = 0.0
        self._paused = 0.0

    def count(self, pairs: float) -> None:
        """One more step is done, with this many pairs."""
        self._steps += 1
        self._pairs += pairs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training: evaluation, checkpoints, sampling."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def take(self) -> dict[str, float]:
        """`pairs_per_second` and `step_seconds` of the steps counted since the last call; empty if there were none."""
        seconds = self._clock() - self._start - self._paused
        steps, pairs = self._steps, self._pairs
        self._reset()
        if not steps or seconds <= 0:
            return {}
        return {"pairs_per_second": pairs / seconds, "step_seconds": seconds / steps}


class MetricsWriter:
    """Writes every record to metrics.jsonl, to TensorBoard and to the console; a context manager.

    Opening a directory that holds records continues it: call `truncate` on metrics.jsonl first when resuming.

    Args:
      workdir: the run's directory; None writes no files (every process of a pod but the first).
      total_steps: steps of each phase by its split, such as {"sft": 60, "train": 200}.
      quiet: nothing on the console.
      console: where to print; standard output unless given. A terminal gets a progress line for each phase.
      logs: each is given every record too; one that raises an error is given no more.
    """

    def __init__(
        self,
        workdir: Path | None,
        *,
        total_steps: Mapping[str, int],
        quiet: bool,
        console: Console | None = None,
        logs: Sequence[Callable[[Record], None]] = (),
    ):
        self._logs = list(logs)
        self._total = dict(total_steps)
        self._console = console or Console(quiet=quiet)
        if quiet:
            self._console.quiet = True
        self._started: dict[str, tuple[int, float]] = {}
        self._tasks: dict[str, TaskID] = {}
        self._file = self._events = self._progress = None
        self._workdir, self._flushed = workdir, -math.inf
        if workdir is not None:
            path = workdir / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            truncate(path, lambda record: True)
            self._events = open_events(workdir / "tensorboard", read(path))
            self._file = path.open("a", encoding="utf-8")
        if self._console.is_terminal and not quiet:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", justify="right"),
                TextColumn("{task.fields[numbers]}", markup=False),
                TextColumn("{task.fields[left]}", style="dim", markup=False, justify="right"),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record: `step`, `split`, and numbers (also NumPy scalars and arrays of one element) or strings."""
        values = {name: _plain(value) for name, value in record.items()}
        finite = _without_nan(values)
        if self._file:
            # Flushed, not synced: the line then outlives the process, and a machine that dies is resumed from a
            # checkpoint, which drops the records after it.
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        if self._events:
            add_event(self._events, finite, time.time())
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        for log in list(self._logs):
            try:
                log(values)
            except Exception as error:  # somebody else's service: training goes on without it
                self._logs.remove(log)
                self.message(f"warning: a tracker failed and gets no more records ({error})")
        left = self._time_left(values)
        if self._progress and values["split"] in self._total:
            self._advance(self._progress, values, left)
        else:
            self.message(self._line(values, left))

    def event(self, event: Mapping[str, Any], words: str) -> None:
        """Write what a person should look at: a line of events.jsonl, and `words` on the console."""
        if self._workdir is not None:
            with (self._workdir / EVENTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_without_nan(event), allow_nan=False) + "\n")
        self.message(words)

    def message(self, text: str) -> None:
        """Print a line (above the progress bar, where there is one)."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, rows: Sequence[tuple[str, float | None, float | None]]) -> None:
        """Print a table of (metric, before, after), as `before_after` makes it, and end the progress lines."""
        if self._progress:
            self._progress.stop()
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        table.add_column("")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        for name, before, after in rows:
            change = "" if before is None or after is None else f"{after - before:+{FORMATS.get(name, '.4g')}}"
            table.add_row(name, *("–" if v is None else show(name, v) for v in (before, after)), change)
        self._console.print(table)

    def side_by_side(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print texts in columns, a line between rows."""
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_lines=True)
        for name in columns:
            table.add_column(name, ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(text)) for text in row))
        self._console.print(table)

    def close(self) -> None:
        """Finish the progress lines and close the files."""
        if self._progress:
            self._progress.stop()
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()

    def _time_left(self, values: Record) -> str:
        # By the wall clock since the phase's first record: that leaves out compiling and counts evaluation.
        split, step, now = values["split"], values["step"], time.monotonic()
        first, start = self._started.setdefault(split, (step, now))
        if not first < step < self._total.get(split, 0):
            return ""
        seconds = round((now - start) / (step - first) * (self._total[split] - step))
        return f"left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _line(self, values: Record, left: str) -> str:
        split = values["split"]
        total = self._total.get(split, self._total.get("train"))
        words = [f"step {values['step']}" + (f"/{total}" if total else ""), split]
        words += [f"{short} {show(name, values[name])}" for name, short in LINE.items() if name in values]
        if "pairs_per_second" in values:
            words.append(f"{show('pairs_per_second', values['pairs_per_second'])} pairs/s")
        return " ".join([*words, left]).rstrip()

    def _advance(self, progress: Progress, values: Record, left: str) -> None:
        split, step = values["split"], values["step"]
        loss = "dpo_loss" if "dpo_loss" in values else "loss"
        words = [
            f"{word} {show(name, values[name])}"
            for name, word in ((loss, "loss"), ("accuracy", "acc"))
            if name in values
        ]
        if "pairs_per_second" in values:
            words.append(f"{show('pairs_per_second', values['pairs_per_second'])} pairs/s")
        fields = {"completed": step, "numbers": "  ".join(words), "left": left}
        if split not in self._tasks:
            progress.start()
            self._tasks[split] = progress.add_task(split, total=self._total[split], **fields)
        else:
            progress.update(self._tasks[split], **fields)


def _without_nan(record: Mapping[str, Any]) -> Record:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}


def _plain(value: Any) -> str | int | float | None:
    """A JSON value for what a training loop holds: NumPy and JAX scalars become Python's."""
    if value is None or isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
