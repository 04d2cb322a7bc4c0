"""A run on the console: a line a record, or on a terminal a progress line for each phase; tables at the end."""

import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from dpo_jax.records.records import METRICS, Record, metric_of, printable, show_metric

LINE = {name: metric.short for name, metric in METRICS.items() if metric.short}


class RunConsole:
    """Prints a run's records, messages and tables; its arguments are those of `MetricsWriter`."""

    def __init__(self, total_steps: Mapping[str, int], *, quiet: bool, console: Console | None = None):
        self._total = dict(total_steps)
        self._console = console or Console()
        self._console.quiet |= quiet
        self._started: dict[str, tuple[int, float]] = {}
        self._tasks: dict[str, TaskID] = {}
        self._progress = None
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

    def record(self, record: Record) -> None:
        """Show a record: in its phase's progress line on a terminal, else in a line of its own."""
        left = self._time_left(record)
        if self._progress and record["split"] in self._total:
            self._advance(self._progress, record, left)
        else:
            self.message(self._line(record, left))

    def message(self, text: str) -> None:
        """Print a line (above the progress bar, where there is one)."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def before_after_table(self, title: str, rows: Sequence[tuple[str, float | None, float | None]]) -> None:
        """Print a table of (metric, before, after), as `before_after` makes it, and end the progress lines."""
        self.close()
        table = _table(title)
        for name in ("", "before", "after", "change"):
            table.add_column(name, justify="right" if name else "left")
        for name, before, after in rows:
            change = "" if before is None or after is None else f"{after - before:+{metric_of(name).form}}"
            table.add_row(name, *("–" if v is None else show_metric(name, v) for v in (before, after)), change)
        self._console.print(table)

    def side_by_side(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print texts in columns, a line between rows."""
        table = _table(title, show_lines=True)
        for name in columns:
            table.add_column(name, ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(text)) for text in row))
        self._console.print(table)

    def close(self) -> None:
        """End the progress lines."""
        if self._progress:
            self._progress.stop()

    def _time_left(self, record: Record) -> str:
        # By the wall clock since the phase's first record: that leaves out compiling and counts evaluation.
        split, step, now = record["split"], record["step"], time.monotonic()
        first, start = self._started.setdefault(split, (step, now))
        if not first < step < self._total.get(split, 0):
            return ""
        seconds = round((now - start) / (step - first) * (self._total[split] - step))
        return f"left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _line(self, record: Record, left: str) -> str:
        total = self._total.get(record["split"], self._total.get("train"))
        step = f"step {record['step']}" + (f"/{total}" if total else "")
        return " ".join([step, record["split"], *_numbers(record, LINE), left]).rstrip()

    def _advance(self, progress: Progress, record: Record, left: str) -> None:
        split, loss = record["split"], "dpo_loss" if "dpo_loss" in record else "loss"
        numbers = "  ".join(_numbers(record, {loss: "loss", "accuracy": "acc"}))
        fields = {"completed": record["step"], "numbers": numbers, "left": left}
        if split not in self._tasks:
            progress.start()
            self._tasks[split] = progress.add_task(split, total=self._total[split], **fields)
        else:
            progress.update(self._tasks[split], **fields)


def _table(title: str, *, show_lines: bool = False) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_lines=show_lines)


def _numbers(record: Record, names: Mapping[str, str]) -> list[str]:
    """The metrics that a record has, with their short names; its throughput last."""
    words = [f"{short} {show_metric(name, record[name])}" for name, short in names.items() if name in record]
    if "pairs_per_second" in record:
        words.append(f"{show_metric('pairs_per_second', record['pairs_per_second'])} pairs/s")
    return words
