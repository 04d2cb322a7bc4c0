"""Where a run's records go: metrics.jsonl, TensorBoard events, the console, and trackers.

TensorBoard's events are a copy of metrics.jsonl, and are made anew from it whenever a run is opened again.
"""

import contextlib
import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_jax.errors import UserError
from dpo_jax.records.console import RunConsole
from dpo_jax.records.directory import EVENTS, METRICS, SAMPLES
from dpo_jax.records.record_file import RecordFile
from dpo_jax.records.records import Record, read_metrics, without_nan
from dpo_jax.records.shapes import Event, MetricRecord, Sample
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
        self._files: dict[str, RecordFile] = {}
        self._events, self._flushed = None, -math.inf
        self._tensorboard = (workdir or Path()) / "tensorboard"
        if workdir is not None:
            workdir.mkdir(parents=True, exist_ok=True)
            shapes = {METRICS: MetricRecord, SAMPLES: Sample, EVENTS: Event}
            self._files = {name: RecordFile(workdir / name, shape) for name, shape in shapes.items()}
            with _naming(self._tensorboard):
                self._events = open_events(self._tensorboard, read_metrics(workdir / METRICS))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.console.close()
        # Of two errors the first one says what happened: here it may be only that the disk is full still.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError, UserError):
            for file in self._files.values():
                file.close()
            if self._events:
                with _naming(self._tensorboard):
                    self._events.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record: `step`, `split`, and numbers (also NumPy scalars and arrays of one element) or strings."""
        values = {name: _plain(value) for name, value in record.items()}
        self._append(METRICS, [values])
        if self._events:
            with _naming(self._tensorboard):
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
        self._append(EVENTS, [event])
        self.message(words)

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records to samples.jsonl: all of them or, where that fails, none."""
        self._append(SAMPLES, records)

    def forget_samples(self, when: str) -> None:
        """Remove the records of samples.jsonl that were taken then."""
        for name in {SAMPLES} & set(self._files):
            self._files[name].keep(lambda record: record["when"] != when)

    def sync(self) -> None:
        """Have all records on disk, before a checkpoint that is made after them."""
        for file in self._files.values():
            file.sync()

    @property
    def held(self) -> dict[str, Record]:
        """How many records each file has, and which, see `RecordFile.held`; in the process that writes."""
        return {name: file.held for name, file in self._files.items()}

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if name in self._files:
            self._files[name].append(records)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of the file system in here names the file: what a write raises does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _plain(value: Any) -> str | int | float | None:
    """A JSON value for what a training loop holds: NumPy and JAX scalars become Python's."""
    if value is None or isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
