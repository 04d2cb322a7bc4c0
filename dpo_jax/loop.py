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

from dpo_jax.attention import Slots
from dpo_jax.data.packing import RowShape
from dpo_jax.data.pipeline import StepSource, batches
from dpo_jax.errors import UserError
from dpo_jax.length_bias import length_correlation, length_groups
from dpo_jax.memory import peak_gb
from dpo_jax.metrics import MetricsWriter, Throughput
from dpo_jax.sharding import make_any, to_global
from dpo_jax.step import TrainState

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
    return Slots(shape.prompt, shape.chosen, shape.rejected)


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
    for item in batches(source, 0):
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
    """
    total = len(phase.source)
    throughput = Throughput()
    compiled: set[RowShape] = set()
    pending: tuple[int, dict[str, jax.Array], dict[str, Any]] | None = None
    # Of several processes perhaps only one got the signal: what any knew at update n, all know with its metrics.
    any_of = make_any(mesh) if jax.process_count() > 1 else None
    asked = False

    def record() -> None:
        nonlocal pending, asked
        if pending is None:
            return
        n, metrics, info = pending
        pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for update n
        asked = bool(values.pop(STOP, False))
        throughput.count(info["pairs"])
        if n == 1 or n % phase.log_every == 0 or n == total:
            facts = {"pairs": info["pairs"], "tokens": info["tokens"], "useful_token_fraction": info["fraction"]}
            facts["memory_gb"] = peak_gb()
            writer.write({"step": n, "split": phase.split} | values | facts | throughput.take())
        lost = [name for name, value in values.items() if not math.isfinite(value)]
        if lost:  # before any save: the checkpoints that are there stay good
            raise UserError(
                f"{phase.split} step {n}: {', '.join(lost)} not finite; earlier checkpoints are kept; lower the "
                "learning rate in a new workdir"
            )

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
    for item in batches(phase.source, start):
        n = item["info"]["step"] + 1
        batch, slots = place(item, mesh)
        if item["info"]["shape"] not in compiled:
            # Compiling is not training: the step before is waited for, then the clock stands still.
            record()
            with throughput.paused():
                state, metrics = phase.train_step(state, ref_params, batch, slots)
            compiled.add(item["info"]["shape"])
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
        save_due = last or stopping or (phase.checkpoint_every > 0 and n % phase.checkpoint_every == 0)
        if eval_due or save_due:
            record()
        if eval_due:
            evaluate_at(n)
        if save_due:
            with throughput.paused():
                phase.save(n, state, ref_params)
        if stopping and not last:
            raise Stopped
    return state
