"""Two processes: the plan and batches of one, one writer of the cache, runs that change their number."""

import json
import signal
import sys
import time

import numpy as np
import pytest

from dpo_jax.records.records import read_records
from tests import processes
from tests.end_to_end.test_train import SMALL, _command, _finish, _values, environment  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

CHANGED = SMALL | {"sft_steps": 0, "num_steps": 24, "eval_every": 0, "checkpoint_every": 8, "sample_tokens": 2}

READER = """
import dataclasses, json, sys
import jax, numpy as np
from dpo_jax.parallel.processes import join
join()
from dpo_jax.data import prepare as module
from dpo_jax.parallel.mesh import local_rows, make_mesh, row_shards
from dpo_jax.rows.pipeline import StepSource
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.rows.shape import Order, RowLimits
from tests.data.test_render import bpe_tokenizer

rows, cache, out = sys.argv[1:]
built = []
produce = module.tokenise
module.tokenise = lambda *arguments, **named: built.append(1) or produce(*arguments, **named)
prepared = module.prepare(module.DataRequest(f"{rows}/a.jsonl:3,{rows}/b.jsonl:1", cache_dir=cache), bpe_tokenizer())
mesh = make_mesh(-1, 1, 1)
limits = RowLimits(row_shards(mesh) * 2)
schedule = make_schedule(prepared.train, 32, limits, Order(), prepared.split.mixture)
rows_of = {s.rows // 2: local_rows(mesh, s.rows // 2) for s in schedule.shapes}
reads = []
class Watched:
    lengths = prepared.train.lengths
    def __len__(self): return len(prepared.train)
    def __getitem__(self, i): reads.append(i); return prepared.train[i]
source = StepSource(dataclasses.replace(schedule, groups=Watched()), 2, rows_of, 5)
held = {}
for step in range(5):
    item = source[step]
    arrays = {name: x for name, x in item.batch._asdict().items() if x is not None}
    held |= {f"{step}.{name}": x for name, x in arrays.items()} | {f"{step}.placed": item.placed}
    held[f"{step}.rows"] = rows_of[schedule.place(step)[0].rows // 2]
np.savez(f"{out}-{jax.process_index()}.npz", built=np.array(built), reads=np.array(reads), **held)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    base, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    words = lambda: " ".join(rng.choice(["red", "blue", "green", "grey"], rng.integers(1, 30)))
    for name, count in (("a", 300), ("b", 100)):
        lines = [{"prompt": f"{i} {words()}", "chosen": f"yes {words()}", "rejected": words()} for i in range(count)]
        (base / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return base


def _read(rows, count, tmp_path, environment):  # noqa: F811
    command = [sys.executable, "-c", READER, str(rows), str(tmp_path / f"cache{count}"), str(tmp_path / f"{count}")]
    devices = {"XLA_FLAGS": processes.quick_to_compile(4 // count)["XLA_FLAGS"]}
    processes.end(processes.start([command] * count, environment | devices), [0] * count)
    return [dict(np.load(tmp_path / f"{count}-{i}.npz")) for i in range(count)]


def test_processes_load_their_own_rows_and_make_the_batches_of_one(rows, tmp_path, environment):  # noqa: F811
    (one,) = _read(rows, 1, tmp_path, environment)
    several = _read(rows, 2, tmp_path, environment)
    assert sum(len(held["built"]) for held in several) == 1  # one wrote the cache, the other waited
    assert sum(len(held["reads"]) for held in several) == len(one["reads"]) == 5 * 32
    for step in range(5):
        order = np.argsort(np.concatenate([held[f"{step}.rows"] for held in several]))
        for held in several:
            np.testing.assert_array_equal(held[f"{step}.placed"], one[f"{step}.placed"])
        for name in ("tokens", "segments", "positions", "source", "is_group", "completion_tokens"):
            together = np.concatenate([held[f"{step}.{name}"] for held in several], axis=1)[:, order]
            np.testing.assert_array_equal(together, one[f"{step}.{name}"])


def _distributed(workdir, count, environment, **changed):  # noqa: F811
    return processes.start([[*_command(workdir, **changed), "--distributed"]] * count, environment)


def _same(ours, theirs):
    assert [(r["split"], r["step"]) for r in ours] == [(r["split"], r["step"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key, value in a.items():
            # Rows of another number of shards are padded differently; everything else is the same run.
            if key != "useful_token_fraction":
                assert b[key] == (value if isinstance(value, str) else pytest.approx(value, rel=2e-4, abs=2e-5)), key


def test_a_signal_to_one_of_two_stops_both_and_one_goes_on(tmp_path, environment):  # noqa: F811
    _finish(tmp_path / "one", environment, **CHANGED)
    whole = _values(tmp_path / "one")
    started = _distributed(tmp_path / "two", 2, environment, **CHANGED)
    path, deadline = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 200
    while not any(r["split"] == "train" and r["step"] >= 2 for r in read_records(path)):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), processes.end(started, (0, 0))
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    processes.end(started, (143, 143))
    saved = max(int(p.name) for p in (tmp_path / "two" / "checkpoints").iterdir() if p.name.isdigit())
    stopped = _values(tmp_path / "two")
    assert 3 <= saved < 24
    assert max(r["step"] for r in stopped if r["split"] == "train") == saved
    _finish(tmp_path / "two", environment, **CHANGED)
    _same(whole, _values(tmp_path / "two"))
    assert (tmp_path / "two" / "export" / "model.safetensors").exists()


def test_processes_that_differ_are_refused(tmp_path, environment):  # noqa: F811
    commands = [[*_command(tmp_path / "run", **CHANGED | {"seed": seed}), "--distributed"] for seed in (0, 1)]
    first, second = processes.end(processes.start(commands, environment), [2, 2])
    assert "error: another process differs from the first one" in first
    assert "error: process 1 has other config and training or held-out pairs" in second


def test_hosts_with_disks_of_their_own_agree_on_what_the_reference_has_said(tmp_path, environment):  # noqa: F811
    """Only the first one kept the values: the second run must not leave the others to compute alone."""
    kept = CHANGED | {"num_steps": 2, "checkpoint_every": 0, "sample_prompts": 0, "export": False}
    kept |= {"reference_cache": True, "kl_prompts": 0}
    for name, computed in (("first", "24 to compute"), ("second", "0 to compute")):
        command = [*_command(tmp_path / name, **kept), "--distributed"]
        disks = [environment | {"DPO_JAX_CACHE": f"{tmp_path}/disk{number}"} for number in range(2)]
        printed = processes.end(processes.start([command] * 2, disks), [0, 0])
        assert computed in printed[0]
    _same(_values(tmp_path / "first"), _values(tmp_path / "second"))
