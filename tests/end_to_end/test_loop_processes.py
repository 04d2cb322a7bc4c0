"""Runs on the policy's own answers as two processes: their records are those of one, and its pairs too."""

import sys

import numpy as np
import pytest

from dpo_jax.records.records import read_records
from tests import processes
from tests.end_to_end.test_train import environment  # noqa: F401 (a fixture)
from tests.rl.test_phase import SETTINGS as RL
from tests.training.small import SMALL, values
from tests.training.test_rounds import SETTINGS as ROUNDS

pytestmark = pytest.mark.slow

RUNS = {"rl": RL | {"num_steps": 3, "eval_every": 3}, "rounds": ROUNDS}


def _run(workdir, cache, count, environment, settings):  # noqa: F811
    keys = [f"--config.{k}={v}" for k, v in (SMALL | settings | {"cache_dir": str(cache)}).items()]
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py", f"--workdir={workdir}", *keys]
    devices = {"XLA_FLAGS": processes.quick_to_compile(2 // count)["XLA_FLAGS"]}
    command += ["--distributed"] if count > 1 else []
    return processes.end(processes.start([command] * count, environment | devices), [0] * count)


@pytest.mark.parametrize("kind", list(RUNS))
def test_two_processes_make_the_run_of_one(kind, tmp_path, environment):  # noqa: F811
    for count in (1, 2):
        _run(tmp_path / str(count), tmp_path / "cache", count, environment, RUNS[kind])
    one, two = (values(tmp_path / str(count)) for count in (1, 2))
    assert [(r["split"], r["step"]) for r in two] == [(r["split"], r["step"]) for r in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                np.testing.assert_allclose(ours[key], value, rtol=2e-4, atol=2e-5, err_msg=key)
            else:
                assert ours[key] == value, key
    if kind == "rounds":
        for number in ("1", "2"):
            names = [tmp_path / str(count) / "rounds" / f"{number}.jsonl" for count in (1, 2)]
            said = [
                [
                    {key: r[key] for key in ("prompt_token_ids", "token_ids_a", "token_ids_b", "label")}
                    for r in read_records(path)
                ]
                for path in names
            ]
            assert said[0] == said[1]
            assert said[0]
