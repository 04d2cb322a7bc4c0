"""A run begun before the package had rooms is resumed: its checkpoint, reference, records and config.

`tests/golden/runs/stopped.tar.xz` was made by the command below with an earlier version: `stopped/` by SIGTERM after
three updates of DPO, `whole/metrics.jsonl` without a stop.
"""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests import processes, programs
from tests.end_to_end.test_train import CLOCK

pytestmark = pytest.mark.slow
RUNS = Path("tests/golden/runs/stopped.tar.xz")
KEYS = """
model=tests/golden/trl/tiny dataset=tests/golden/trl/pairs.jsonl batch_size=4 sft_steps=2 num_steps=6 eval_pairs=4
eval_every=2 log_every=1 checkpoint_every=2 keep_checkpoints=1 sample_prompts=1 sample_tokens=8 kl_prompts=2
max_prompt_length=64 max_completion_length=32
sft_on=chosen sft_learning_rate=3e-3 sft_lr_schedule=constant dpo_beta=0.1 learning_rate=2e-4 judge=
""".split()


def _records(directory):
    """Records by split and step, without what depends on the machine's state."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {(r["split"], r["step"]): {k: v for k, v in r.items() if k not in CLOCK} for r in records}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The directory after the same command, the lines of metrics.jsonl before it, and what it printed."""
    directory = tmp_path_factory.mktemp("older")
    with tarfile.open(RUNS) as archive:
        archive.extractall(directory, filter="data")
    before = (directory / "stopped" / "metrics.jsonl").read_text()
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py:tiny"]
    command += [f"--workdir={directory / 'stopped'}", *(f"--config.{key}" for key in KEYS)]
    environment = processes.quick_to_compile() | {"DPO_JAX_CACHE": str(directory / "cache")}
    done = programs.run(command, environment, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, before, done.stdout


def test_it_is_resumed_and_not_begun_anew(resumed):
    directory, before, printed = resumed
    assert "from checkpoint 5" in printed  # two updates of SFT, three of DPO
    assert (directory / "stopped" / "metrics.jsonl").read_text().startswith(before)
    assert (directory / "stopped" / "export" / "model.safetensors").exists()


def test_its_numbers_are_those_of_the_run_that_was_never_stopped(resumed):
    directory, before, _ = resumed
    ours, theirs = _records(directory / "stopped"), _records(directory / "whole")
    assert list(ours) == list(theirs)
    assert len(theirs) > len(before.splitlines())
    for key, record in theirs.items():
        assert ours[key].keys() >= record.keys()
        for name, value in record.items():
            if isinstance(value, str):
                assert ours[key][name] == value
            elif name in ("kl", "kl_per_token", "kl_error"):  # of answers that today's sampler draws otherwise
                assert abs(ours[key]["kl"] - record["kl"]) <= 4 * (ours[key]["kl_error"] + record["kl_error"])
            else:
                # A margin is a small difference of log-probabilities around -100, summed in another order today.
                np.testing.assert_allclose(ours[key][name], value, rtol=1e-4, atol=5e-6, err_msg=f"{key} {name}")
