"""The loop alone: batches made by hand, a model of one parameter, and numbers that a person can follow."""

import json
import math
import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batches import Item
from dpo_jax.errors import NOT_FINITE, Stopped, UserError
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.records.writer import MetricsWriter
from dpo_jax.training import loop as loop_module
from dpo_jax.training.loop import STOPPING, Phase, run_phase, stop_signal

RATE = 0.25
TARGETS = [4.0, 2.0, 8.0, 2.0, 6.0, 4.0]  # of updates 1 .. 6
# w ← w - RATE · 2 (w - target): half of the way, from 0.
WEIGHTS = [0.0, 2.0, 2.0, 5.0, 3.5, 4.75, 4.375]
LOSSES = [16.0, 0.0, 36.0, 9.0, 6.25, 0.5625]  # (w - target)² before each update


@jax.jit
def _step(w, target):
    loss, grad = (w - target) ** 2, 2 * (w - target)
    finite = jnp.isfinite(grad)
    return jnp.where(finite, w - RATE * grad, w), {
        "surprise": loss,
        "grad_norm": jnp.abs(grad),
        "skipped": 1.0 - finite,
    }


def _items(targets, start=0, shapes=lambda n: "narrow"):
    for n, target in enumerate(targets[start:], start + 1):
        facts = {"pairs": 2, "tokens": 10 * n}
        yield Item(n, jax.device_put(np.float32(target)), shapes(n), facts, np.array([[2 * n, 2 * n + 1], [-1, -1]]))


class Loop:
    """A phase over `targets` in a directory, and what it has saved."""

    def __init__(self, workdir, targets=TARGETS, **changed):
        self.workdir, self.targets, self.saved, self.evaluated, self.stop = workdir, targets, {}, [], threading.Event()
        self.shapes, self.bad = [], []
        options = {"log_every": 1, "eval_every": 3, "checkpoint_every": 2, "max_bad_steps": 1, "stuck_after": 0.0}
        self.phase = Phase(
            split="train",
            loss="surprise",
            updates=len(targets),
            step=self._step,
            evaluate=self._evaluate,
            save=lambda n, w: self.saved.update({n: float(jax.device_get(w))}),
            check_save=lambda: None,
            keep_bad_batch=lambda split, n, examples: self.bad.append((split, n, examples.tolist())) or "bad.json",
            **options | changed,
        )

    def _step(self, w, batch, shape):
        self.shapes.append(shape)
        return _step(w, batch)

    def _evaluate(self, w, n):
        assert n in (0, self.phase.updates) or n % self.phase.eval_every == 0
        self.evaluated.append(float(jax.device_get(w)))
        return {"distance": 10 - self.evaluated[-1]}

    def run(self, start=0, weight=0.0, items=None):
        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
        with MetricsWriter(self.workdir, total_steps={"train": len(self.targets)}, quiet=True) as writer:
            items = _items(self.targets, start) if items is None else items
            w = run_phase(self.phase, items, jnp.float32(weight), start, mesh=mesh, writer=writer, stop=self.stop)
        return float(w)

    def records(self, split="train", name="metrics.jsonl"):
        lines = (self.workdir / name).read_text().splitlines()
        return [r for r in map(json.loads, lines) if r["split"] == split]


def test_it_trains_records_evaluates_and_saves(tmp_path):
    loop = Loop(tmp_path)
    assert loop.run() == WEIGHTS[-1]
    records = loop.records()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["surprise"] for r in records] == LOSSES
    assert [r["tokens"] for r in records] == [10, 20, 30, 40, 50, 60]
    assert all(r["pairs"] == 2 and r["skipped"] == 0 and r["memory_gb"] > 0 for r in records)
    assert [(r["step"], r["distance"]) for r in loop.records("eval")] == [(0, 10.0), (3, 5.0), (6, 5.625)]
    assert loop.evaluated == [WEIGHTS[n] for n in (0, 3, 6)]
    assert loop.saved == {n: WEIGHTS[n] for n in (2, 4, 6)}


def test_a_record_comes_first_last_and_as_often_as_asked(tmp_path):
    loop = Loop(tmp_path, log_every=4, eval_every=0, checkpoint_every=0)
    loop.run()
    assert [r["step"] for r in loop.records()] == [1, 4, 6]
    assert [r["step"] for r in loop.records("eval")] == [0, 6]
    assert list(loop.saved) == [6]


def test_it_ends_with_its_updates_though_there_are_more_batches(tmp_path):
    loop = Loop(tmp_path)
    more = iter(_items([*TARGETS, 100.0, 200.0]))
    assert loop.run(items=more) == WEIGHTS[-1]
    assert next(more).update == 7


def test_batches_whose_making_is_stopped_end_it_with_what_was_done(tmp_path):
    def stopped():
        yield from _items(TARGETS[:3])
        raise Stopped

    loop = Loop(tmp_path, checkpoint_every=0)
    with pytest.raises(Stopped):
        loop.run(items=stopped())
    assert loop.saved == {3: WEIGHTS[3]}
    assert [r["step"] for r in loop.records()] == [1, 2, 3]


def test_checkpoints_wait_for_an_update_that_a_run_can_go_on_from(tmp_path):
    loop = Loop(tmp_path, checkpoint_every=2, whole=3)
    loop.run()
    assert loop.saved == {3: WEIGHTS[3], 6: WEIGHTS[6]}
    stopped = Loop(tmp_path / "stopped", checkpoint_every=0, whole=3)
    stopped.stop.set()
    with pytest.raises(Stopped):
        stopped.run()
    assert stopped.saved == {3: WEIGHTS[3]}


def test_an_update_that_is_not_finite_is_skipped_reported_and_saves_wait_for_a_good_one(tmp_path):
    loop = Loop(tmp_path, [4.0, math.nan, 2.0, 8.0])
    assert loop.run() == 5.0  # 0, 2, 2 (skipped), 2, 5
    assert [r["skipped"] for r in loop.records()] == [0, 1, 0, 0]
    assert loop.records()[1]["surprise"] is None  # JSON has no NaN
    (event,) = loop.records(name="events.jsonl")
    assert (event["event"], event["step"], event["pairs"]) == ("skipped", 2, [4, 5])
    assert loop.saved == {3: 2.0, 4: 5.0}  # the one of update 2 came after update 3


def test_too_many_in_a_row_end_it_and_name_the_batch(tmp_path):
    loop = Loop(tmp_path, [4.0, math.nan, math.inf, 2.0], log_every=10)
    with pytest.raises(UserError, match=r"step 3: .* not finite 2 times in a row, more than max_bad_steps=1") as e:
        loop.run()
    assert e.value.code == NOT_FINITE
    assert loop.bad == [("train", 3, [6, 7])]
    assert [(r["step"], r["skipped"]) for r in loop.records()] == [(1, 0), (3, 2)]
    assert loop.saved == {}


def test_an_evaluation_before_training_that_is_not_finite_ends_it(tmp_path):
    loop = Loop(tmp_path)
    with pytest.raises(UserError, match="the evaluation before any update is not finite"):
        loop.run(weight=math.nan)
    assert loop.shapes == []


def test_stopped_and_resumed_is_never_stopped(tmp_path):
    whole, cut = Loop(tmp_path / "whole"), Loop(tmp_path / "cut")
    whole.run()

    def signalled():
        for item in _items(TARGETS):
            if item.update == 3:
                cut.stop.set()  # as SIGTERM does
            yield item

    with pytest.raises(Stopped):
        cut.run(items=signalled())
    assert cut.saved[3] == WEIGHTS[3]
    assert [r["step"] for r in cut.records()] == [1, 2, 3]
    cut.stop.clear()
    assert cut.run(start=3, weight=cut.saved[3]) == WEIGHTS[-1]
    clock = ("pairs_per_second", "step_seconds", "memory_gb")
    plain = lambda loop: [{k: v for k, v in r.items() if k not in clock} for r in loop.records()]
    assert plain(cut) == plain(whole)
    assert cut.records("eval") == whole.records("eval")
    assert cut.run(start=6, weight=WEIGHTS[-1]) == WEIGHTS[-1]  # nothing is left
    assert len(cut.records()) == 6


def test_a_shape_is_compiled_outside_the_clock_and_given_to_the_step(tmp_path, monkeypatch):
    doing = []
    monkeypatch.setattr(loop_module, "beat", lambda what, patience=1.0: doing.append(what))
    loop = Loop(tmp_path)
    loop.run(items=_items(TARGETS, shapes=lambda n: "wide" if n == 4 else "narrow"))
    assert loop.shapes == ["narrow"] * 3 + ["wide"] + ["narrow"] * 2
    assert [what for what in doing if "compiling" in what] == ["compiling train step 1", "compiling train step 4"]


def test_it_takes_any_tree_as_state_and_need_not_evaluate_or_know_pairs(tmp_path):
    def step(state, batch, shape):
        w, metrics = _step(state["w"], batch)
        return {"w": w, "old": state["w"]}, metrics

    phase = Phase(
        "other", "surprise", len(TARGETS), step, 1, 0, 0, None, lambda n, state: None, lambda: None, 0, None, 0.0
    )
    items = (Item(i.update, i.batch, i.shape, {}, np.zeros(0, np.int64)) for i in _items(TARGETS))
    mesh, state = make_mesh(1, 1, 1, jax.devices()[:1]), {"w": jnp.float32(0), "old": jnp.float32(0)}
    with MetricsWriter(tmp_path, total_steps={}, quiet=True) as writer:
        state = run_phase(phase, items, state, 0, mesh=mesh, writer=writer, stop=threading.Event())
    assert {name: float(x) for name, x in state.items()} == {"w": WEIGHTS[6], "old": WEIGHTS[5]}
    records = Loop(tmp_path).records("other")
    assert [r["surprise"] for r in records] == LOSSES
    assert not any("pairs_per_second" in r or "pairs" in r for r in records)


def test_the_loop_knows_nothing_of_what_is_trained():
    """No import and no word: reward models, online rounds and RL call the same loop."""
    text = Path("dpo_jax/training/loop.py").read_text().lower()
    for word in ("dpo", "sft", "reference", "grain", "schedule", "pipeline", "objective", "chosen", "rejected"):
        assert word not in text.replace("dpo_jax", ""), word


@pytest.mark.parametrize("number", STOPPING)
def test_each_signal_asks_for_the_end_once_and_is_named_by_it(number, capfd):
    before = [signal.signal(one, signal.default_int_handler) for one in STOPPING]
    try:
        with pytest.raises(Stopped) as stopped, stop_signal() as stop:  # noqa: PT012
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            assert stop.wait(5)
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process at once
            raise Stopped
        assert [signal.getsignal(one) for one in STOPPING] == [signal.default_int_handler] * len(STOPPING)
    finally:
        for one, handler in zip(STOPPING, before, strict=True):
            signal.signal(one, handler)
    assert (stopped.value.signal, stopped.value.name) == (number, signal.Signals(number).name)
    assert capfd.readouterr().out == ("saving after this update; Ctrl-C again ends it at once\n" if number == 2 else "")


def test_a_signal_that_was_ignored_stays_ignored():
    """As below `nohup`, and by launch/worker.sh."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)
