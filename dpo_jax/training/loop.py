"""The loop of one phase: batches in; updates, records, evaluations and checkpoints out.

It takes any iterator of batches, any step and any state, and knows nothing of what is trained. Metrics of update n are
fetched while update n+1 runs.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.batches import Item
from dpo_jax.errors import Stopped
from dpo_jax.parallel.mesh import make_any
from dpo_jax.parallel.watchdog import LONGER, beat, watch
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.training.health import SKIPPED, Health, check_evaluation
from dpo_jax.training.measure import Throughput, give_back, peak_gb

STOP = "stop"  # beside the metrics of an update, while they are on the devices
State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Phase(Generic[State]):
    """What one phase does and how often.

    Attributes:
      split, updates: of its records, and how many updates it has.
      loss: the metric that is its loss.
      step: (state, batch, shape) → state, metrics on the devices: `grad_norm`, `skipped` (1: the update was not made)
        and the loss among them.
      log_every: in updates, at least 1.
      eval_every, checkpoint_every: in updates; 0 is only at the end.
      evaluate: (state, updates done) → the values of an `eval` record; None: there is nothing to evaluate.
      save, check_save: saves a checkpoint (updates done, state); raises where a save in the background has failed.
      whole: checkpoints are made after a multiple of so many updates: those in between need what is not in the state.
      max_bad_steps, keep_bad_batch: see `Health`.
      stuck_after: seconds in which nothing moves, after which the process ends; 0: never.
    """

    split: str
    loss: str
    updates: int
    step: Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]]
    log_every: int
    eval_every: int
    checkpoint_every: int
    evaluate: Callable[[State, int], dict[str, Any]] | None
    save: Callable[[int, State], None]
    check_save: Callable[[], None]
    max_bad_steps: int
    keep_bad_batch: Callable[[str, int, np.ndarray], Path]
    stuck_after: float
    whole: int = 1


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the loop then saves and ends. A second SIGTERM ends the process at once."""
    event = threading.Event()

    def handle(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # a notebook's kernel may run us elsewhere
        yield event
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _next(batches: Iterator[Item]) -> Item | Stopped | None:
    """The next batch; None: there is none; or that its making was stopped."""
    try:
        return next(batches, None)
    except Stopped as stopped:
        return stopped


def run_phase(
    phase: Phase[State],
    batches: Iterator[Item],
    state: State,
    start: int,
    *,
    mesh: Mesh,
    writer: MetricsWriter,
    stop: threading.Event,
) -> State:
    """Run updates `start + 1 ..` of a phase to its end; `batches` begin with that of update `start + 1`.

    An iterator that takes long to make a batch may raise Stopped itself, in all processes alike: that is then the end.

    Raises:
      Stopped: `stop` was set; everything up to the last update is recorded and saved.
      UserError: a save failed, or too many updates in a row were not finite.
    """
    # Arrays reach the devices by explicit placement only: an implicit transfer in the loop is a bug that costs time.
    with watch(phase.stuck_after), jax.transfer_guard_host_to_device("disallow"):
        return _run(phase, batches, state, start, mesh, writer, stop)


def _run(
    phase: Phase[State],
    batches: Iterator[Item],
    state: State,
    start: int,
    mesh: Mesh,
    writer: MetricsWriter,
    stop: threading.Event,
) -> State:
    throughput, health = Throughput(), Health(phase.split, phase.max_bad_steps, phase.keep_bad_batch)
    # Of several processes perhaps only one got the signal: what any knew at update n, all know with its metrics.
    any_of = make_any(mesh) if jax.process_count() > 1 else None
    pending: tuple[Item, dict[str, jax.Array]] | None = None
    compiled: set[Hashable] = set()
    compiled_at, asked, owed = 0, False, False

    def record() -> None:
        """Fetch and write the metrics of the last update, unless that is done."""
        nonlocal pending, asked
        if pending is None:
            return
        (item, metrics), pending = pending, None
        n = item.update
        # Other processes may still compile what this one has compiled already.
        beat(f"waiting for the numbers of {phase.split} update {n}", LONGER if n == compiled_at else 1.0)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for update n
        asked = bool(values.pop(STOP, False))
        throughput.count(item.facts.get("pairs", 0))
        try:
            health.check(n, values[phase.loss], values, item.examples[item.examples >= 0], writer)
        finally:
            if n == 1 or n % phase.log_every == 0 or n == phase.updates or health.over:
                facts = {**item.facts, SKIPPED: health.take(), "memory_gb": peak_gb()}
                writer.write({"step": n, "split": phase.split} | values | facts | throughput.take())
        phase.check_save()

    def evaluate_at(n: int) -> None:
        if phase.evaluate is not None:
            with throughput.paused():
                values = phase.evaluate(state, n)
                writer.write({"step": n, "split": "eval"} | values)
            if n in (0, phase.updates):
                check_evaluation(values, first=n == 0)

    if start == 0:
        evaluate_at(0)
    if start >= phase.updates:
        return state
    last_made = start
    while (item := _next(batches)) is not None:
        if isinstance(item, Stopped):
            record()
            if last_made > start:
                phase.save(last_made, state)
            raise item
        last_made = n = item.update
        if item.shape in compiled:
            state, metrics = phase.step(state, item.batch, item.shape)
        else:
            # Compiling is not training: the step before is waited for, then the clock stands still.
            record()
            with throughput.paused():
                beat(f"compiling {phase.split} step {n}", LONGER)
                state, metrics = phase.step(state, item.batch, item.shape)
                give_back()  # while the step runs
            compiled.add(item.shape)
            compiled_at = n
        record()
        asking = {} if any_of is None else {STOP: any_of(stop.is_set())}
        pending = (dataclasses.replace(item, batch=None), metrics | asking)
        last, stopping = n == phase.updates, stop.is_set() if any_of is None else asked
        stopping = stopping and n % phase.whole == 0
        eval_due = last or (phase.eval_every > 0 and n % phase.eval_every == 0)
        save_due = last or stopping or owed or (phase.checkpoint_every > 0 and n % phase.checkpoint_every == 0)
        if eval_due or save_due:
            record()
        if eval_due:
            evaluate_at(n)
        # Among bad updates saves wait for a good one: they would push out the checkpoints from before.
        owed = save_due and (health.in_a_row > 0 or n % phase.whole > 0) and not (last or stopping)
        if save_due and not owed:
            beat(f"saving after {phase.split} update {n}", LONGER)
            with throughput.paused():
                phase.save(n, state)
        if last:
            break
        if stopping:
            raise Stopped
    return state
