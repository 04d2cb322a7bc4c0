"""The loop of one phase: steps, evaluations, checkpoints. Metrics of step n are fetched while step n+1 runs."""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.errors import NOT_FINITE, UserError
from dpo_jax.model.attention.dense import Slots
from dpo_jax.parallel.mesh import make_any, to_global
from dpo_jax.parallel.watchdog import LONGER, awaited, beat, watch
from dpo_jax.records.length_bias import length_correlation, length_groups
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.rows.pipeline import StepSource, batches
from dpo_jax.rows.schedule import RowShape
from dpo_jax.training.memory import give_back, peak_gb
from dpo_jax.training.spikes import Losses
from dpo_jax.training.step import SKIPPED, TrainState
from dpo_jax.training.throughput import Throughput

# What an evaluation says of every group of pairs (by source, by length) apart.
BY_GROUP = ("accuracy", "margin")
STOP = "stop"  # beside the metrics of an update, while they are on the devices


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked for the end; the state was saved."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one phase does and how often.

    Attributes:
      split: the records' split, `sft` or `train`.
      source: the rows of every step of the phase.
      train_step: from `step.make_train_step`.
      log_every: in updates, at least 1.
      eval_every, checkpoint_every: in updates; 0 is only at the end.
      evaluate: (state, reference) → the values of an `eval` record, or None.
      save: (updates done in this phase, state, reference); saves a checkpoint.
      check_save: raises where a save in the background has failed.
      max_bad_steps: more skipped updates in a row than this end the run.
      keep_bad_batch: (split, update, pairs of its batch) → where it is written what they are.
      stuck_after: seconds in which nothing moves, after which the process ends; 0: never.
      sync: (reference, parameters) → the reference after every `sync_every` updates; None: it stays as it is.
    """

    split: str
    source: StepSource
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    log_every: int
    eval_every: int
    checkpoint_every: int
    evaluate: Callable[[TrainState, Any], dict[str, Any]] | None
    save: Callable[[int, TrainState, Any], None]
    check_save: Callable[[], None]
    max_bad_steps: int
    keep_bad_batch: Callable[[str, int, np.ndarray], Any]
    stuck_after: float
    sync: Callable[[Any, Any], Any] | None = None
    sync_every: int = 0


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


def slots_of(shape: RowShape) -> Slots:
    """The static widths that a step is compiled for."""
    return Slots(*shape.widths)


def place(item: dict[str, Any], mesh: Mesh) -> tuple[dict[str, jax.Array], Slots]:
    """A loaded step → its global arrays and the widths it is compiled for."""
    shape = item["info"]["shape"]
    return to_global(item["arrays"], mesh, shape.rows // item["arrays"]["tokens"].shape[0]), slots_of(shape)


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    ref_params: Any,
    source: StepSource,
    mesh: Mesh,
    groups: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Means over all pairs of `source`, how many there are (`pairs`), and how their margins depend on length.

    Args:
      eval_step: from `step.make_eval_step`.
      params, ref_params: of the policy and the reference.
      source: the rows of one pass.
      mesh: where they are computed.
      groups: bool `[pairs of source]` by name: for these, `accuracy/NAME`, `margin/NAME` and `pairs/NAME` too; those
        of `length_groups` are always there. `length_correlation` is left out while no pair is won: margins are then
        what rounding leaves between a policy and its equal.
    """
    results: list[Any] = []
    placed: list[np.ndarray] = []
    for item in awaited(batches(source, 0), "the rows of the evaluation"):
        beat("computing the evaluation", LONGER if not results else 1.0)
        batch, slots = place(item, mesh)
        results.append(eval_step(params, ref_params, batch, slots))
        placed.append(item["info"]["placed"])
        if len(results) > 1:  # fetched while the next one runs, so that no more than two batches wait on the devices
            results[-2] = jax.device_get(results[-2])
    results[-1] = jax.device_get(results[-1])
    pair = np.concatenate([x[x >= 0] for x in placed])
    values = {
        name: np.concatenate([r[name][x >= 0] for r, x in zip(results, placed, strict=True)]).astype(np.float64)
        for name in results[0]
    }
    out = {name: float(x.mean()) for name, x in values.items()} | {"pairs": len(pair)}
    lengths = source.schedule.lengths
    correlation = length_correlation(lengths[pair], values["margin"]) if out["accuracy"] else None
    if correlation is not None:
        out["length_correlation"] = correlation
    for group, members in {**(groups or {}), **length_groups(lengths)}.items():
        mine = members[pair]
        if mine.any():
            out |= {f"{name}/{group}": float(values[name][mine].mean()) for name in BY_GROUP if name in values}
            out[f"pairs/{group}"] = int(mine.sum())
    return out


@dataclasses.dataclass
class _Health:
    """What the losses and gradients of a phase were like."""

    losses: Losses = dataclasses.field(default_factory=Losses)
    in_a_row: int = 0  # updates skipped, the last one among them
    since_record: int = 0  # updates skipped


def _judge(
    health: _Health, phase: Phase, n: int, values: Mapping[str, float], info: Mapping[str, Any], writer: MetricsWriter
) -> None:
    """Count and report a skipped update and a loss spike.

    Raises:
      UserError: too many updates in a row were skipped; the batch is written out.
    """
    loss = values.get("dpo_loss", values.get("loss", math.nan))
    pairs = info["placed"][info["placed"] >= 0]
    event = {"step": n, "split": phase.split, "loss": loss, "grad_norm": values["grad_norm"]}
    median = health.losses.spike_over(loss)
    if median is not None:
        writer.event(
            {**event, "event": "spike", "median": median, "pairs": pairs.tolist()},
            f"warning: {phase.split} step {n}: the loss is {loss:.4g}, the median before it {median:.4g} (a spike)",
        )
    if not values[SKIPPED]:
        health.in_a_row = 0
        return
    health.in_a_row += 1
    health.since_record += 1
    found = f"{phase.split} step {n}: loss {loss:.4g}, gradient norm {values['grad_norm']:.4g}"
    writer.event(
        {**event, "event": "skipped", "pairs": pairs.tolist()},
        f"warning: {found}: not finite, the update is skipped ({health.in_a_row} in a row)",
    )
    if health.in_a_row > phase.max_bad_steps:
        where = phase.keep_bad_batch(phase.split, n, pairs)
        raise UserError(
            f"{found}: not finite {health.in_a_row} times in a row, more than max_bad_steps={phase.max_bad_steps}; the "
            f"pairs of the last batch are in {where}; mend them, or lower the learning rate in a new workdir; "
            "checkpoints from before are kept",
            code=NOT_FINITE,
        )


def run_phase(
    phase: Phase,
    state: TrainState,
    ref_params: Any,
    start: int,
    *,
    mesh: Mesh,
    writer: MetricsWriter,
    stop: threading.Event,
) -> TrainState:
    """Run updates `start+1 ..` of a phase to its end.

    Raises:
      Stopped: `stop` was set; everything up to the last update is recorded and saved.
      UserError: a save failed, or too many updates in a row were not finite.
    """
    with watch(phase.stuck_after):
        return _run(phase, state, ref_params, start, mesh=mesh, writer=writer, stop=stop)


def _run(
    phase: Phase,
    state: TrainState,
    ref_params: Any,
    start: int,
    *,
    mesh: Mesh,
    writer: MetricsWriter,
    stop: threading.Event,
) -> TrainState:
    total = len(phase.source)
    throughput = Throughput()
    compiled: set[RowShape] = set()
    pending: tuple[int, dict[str, jax.Array], dict[str, Any]] | None = None
    # Of several processes perhaps only one got the signal: what any knew at update n, all know with its metrics.
    any_of = make_any(mesh) if jax.process_count() > 1 else None
    asked, owed, health = False, False, _Health()
    compiled_at = 0

    def record() -> None:
        nonlocal pending, asked
        if pending is None:
            return
        n, metrics, info = pending
        pending = None
        # Other processes may still compile what this one has compiled already.
        beat(f"waiting for the numbers of {phase.split} update {n}", LONGER if n == compiled_at else 1.0)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for update n
        asked = bool(values.pop(STOP, False))
        throughput.count(info["pairs"])
        try:
            _judge(health, phase, n, values, info, writer)
        finally:
            if n == 1 or n % phase.log_every == 0 or n == total or health.in_a_row > phase.max_bad_steps:
                facts = {"pairs": info["pairs"], "tokens": info["tokens"], "useful_token_fraction": info["fraction"]}
                facts |= {SKIPPED: health.since_record, "memory_gb": peak_gb()}
                writer.write({"step": n, "split": phase.split} | values | facts | throughput.take())
                health.since_record = 0
        phase.check_save()

    def evaluate_at(n: int) -> None:
        if phase.evaluate is not None:
            with throughput.paused():
                values = phase.evaluate(state, ref_params)
                writer.write({"step": n, "split": "eval"} | values)
            if n == 0 and not all(map(math.isfinite, values.values())):
                raise UserError(
                    "the evaluation before any update is not finite: the weights of the model or the reference are "
                    "damaged, or compute_dtype is too narrow for them"
                )

    if start == 0:
        evaluate_at(0)
    if start >= total:
        return state
    for item in awaited(batches(phase.source, start), f"the rows of a {phase.split} step"):
        n = item["info"]["step"] + 1
        batch, slots = place(item, mesh)
        if item["info"]["shape"] not in compiled:
            # Compiling is not training: the step before is waited for, then the clock stands still.
            record()
            with throughput.paused():
                beat(f"compiling {phase.split} step {n}", LONGER)
                state, metrics = phase.train_step(state, ref_params, batch, slots)
                give_back()  # while the step runs
            compiled.add(item["info"]["shape"])
            compiled_at = n
        else:
            state, metrics = phase.train_step(state, ref_params, batch, slots)
        if phase.sync is not None and n % phase.sync_every == 0:
            ref_params = phase.sync(ref_params, state.params)
        record()
        if any_of is not None:
            metrics = metrics | {STOP: any_of(stop.is_set())}
        pending = (n, metrics, item["info"])
        last, stopping = n == total, stop.is_set() if any_of is None else asked
        eval_due = last or (phase.eval_every > 0 and n % phase.eval_every == 0)
        save_due = last or stopping or owed or (phase.checkpoint_every > 0 and n % phase.checkpoint_every == 0)
        if eval_due or save_due:
            record()
        if eval_due:
            evaluate_at(n)
        # Among bad updates saves wait for a good one: they would push out the checkpoints from before.
        owed = save_due and health.in_a_row > 0 and not (last or stopping)
        if save_due and not owed:
            beat(f"saving after {phase.split} update {n}", LONGER)
            with throughput.paused():
                phase.save(n, state, ref_params)
        if stopping and not last:
            raise Stopped
    return state
