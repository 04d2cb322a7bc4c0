"""Where a run's records go: metrics.jsonl, TensorBoard events, the console, and trackers.

TensorBoard's events are a copy of metrics.jsonl, and are made anew from it whenever a run is opened again.
"""

import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_jax.disk import open_append
from dpo_jax.records.console import RunConsole
from dpo_jax.records.records import EVENTS, Record, json_line, read_records, truncate_records, without_nan
from dpo_jax.records.tensorboard import add_event, open_events

FLUSH_SECONDS = 10  # between flushes of TensorBoard's events


class MetricsWriter:
    """Writes every record to metrics.jsonl, to TensorBoard and to the console; a context manager.

    Opening a directory that holds records continues it: call `truncate_records` on metrics.jsonl first when resuming.

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
        self.console = RunConsole(total_steps, quiet=quiet, console=console)
        self.message = self.console.message
        self._file = self._events = None
        self._workdir, self._flushed = workdir, -math.inf
        if workdir is not None:
            path = workdir / "metrics.jsonl"
            workdir.mkdir(parents=True, exist_ok=True)
            truncate_records(path, lambda record: True)
            self._events = open_events(workdir / "tensorboard", read_records(path))
            self._file = open_append(path)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.console, self._file, self._events):
            if file:
                file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record: `step`, `split`, and numbers (also NumPy scalars and arrays of one element) or strings."""
        values = {name: _plain(value) for name, value in record.items()}
        if self._file:
            # Flushed, not synced: the line then outlives the process, and a machine that dies is resumed from a
            # checkpoint, which drops the records after it.
            self._file.write(json_line(values))
            self._file.flush()
        if self._events:
            add_event(self._events, without_nan(values), time.time())
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        for log in list(self._logs):
            try:
                log(values)
            except Exception as error:  # a service that may fail in any way: training continues without it
                self._logs.remove(log)
                self.message(f"warning: a tracker failed and gets no more records ({error})")
        self.console.record(values)

    def event(self, event: Mapping[str, Any], words: str) -> None:
        """Write what a person should look at: a line of events.jsonl, and `words` on the console."""
        if self._workdir is not None:
            with open_append(self._workdir / EVENTS) as file:
                file.write(json_line(event))
        self.message(words)


def _plain(value: Any) -> str | int | float | None:
    """A JSON value for what a training loop holds: NumPy and JAX scalars become Python's."""
    if value is None or isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
