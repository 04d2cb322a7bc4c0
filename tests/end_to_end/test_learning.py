"""Every loss trains the tiny preset to a held-out accuracy above 0.9.

A few updates from scratch in every run of the tests; all losses after the preset's own SFT phase with

    DPO_JAX_SWEEP=1 python -m pytest tests/end_to_end/test_learning.py --write-docs

which takes about half a minute a loss on two idle cores and writes its accuracies into docs/losses.md.
"""

import os
import sys

import pytest

from dpo_jax.objective.losses import LOSSES
from dpo_jax.records.records import read_records
from tests import processes, programs

pytestmark = pytest.mark.slow

# Rows of docs/losses.md and what differs from beta 0.1, 30 updates of 32 pairs at 3e-4.
RUNS = {name: {"loss": name} for name in LOSSES}
RUNS["robust"] |= {"label_smoothing": 0.1}
RUNS["exo_pair"] |= {"label_smoothing": 1e-3}
RUNS["sigmoid_norm"] |= {"dpo_beta": 5.0}
RUNS["simpo"] |= {"dpo_beta": 2.0, "simpo_gamma": 1.0}
RUNS["orpo"] |= {"dpo_beta": 1.0}
for name in ("sft", "cpo", "orpo"):  # likelihood moves slower than a difference of likelihoods
    RUNS[name] |= {"learning_rate": 1e-3, "num_steps": 60}
RUNS["sigmoid:1.0,sft:0.2"] = {"loss": "sigmoid:1.0,sft:0.2"}
RUNS |= {f"f_divergence={f}": {"f_divergence": f} for f in ("forward_kl", "js", "alpha")}
# Rude answers are nothing the policy would say: few pairs weigh much, and a large beta soon has enough of those.
RUNS["wpo"] = {"wpo": True, "dpo_beta": 1.0, "learning_rate": 2e-4, "num_steps": 60}
RUNS |= {"ld_alpha": {"ld_alpha": 0.5}, "reference_sync_steps": {"reference_sync_steps": 10}}
SWEEP = {
    "dpo_beta": 0.1,
    "batch_size": 32,
    "num_steps": 30,
    "learning_rate": 3e-4,
    "eval_every": 0,
    "checkpoint_every": 0,
    "sample_prompts": 0,
    "judge": "",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A process of its own: one CPU device; programs and tokenised pairs shared between the runs."""
    return processes.quick_to_compile() | {"DPO_JAX_CACHE": str(tmp_path_factory.mktemp("environment") / "pairs")}


def _train(workdir, environment, settings):
    """Run the tiny preset; returns the last held-out record."""
    keys = [f"--config.{k}={v}" for k, v in settings.items()]
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py:tiny", f"--workdir={workdir}", *keys]
    done = programs.run(command, environment, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return [r for r in read_records(workdir / "metrics.jsonl") if r["split"] == "eval"][-1]


def test_simpo_learns_without_a_reference(environment, tmp_path):
    """From scratch: a quarter of an SFT phase's work."""
    settings = SWEEP | {"sft_steps": 0, "num_steps": 20, "batch_size": 16, "eval_pairs": 64, "export": False}
    last = _train(tmp_path / "run", environment, settings | RUNS["simpo"] | {"learning_rate": 1e-3})
    assert last["accuracy"] > 0.9
    assert not (tmp_path / "run" / "reference").exists()


@pytest.fixture(scope="module")
def sft(environment, tmp_path_factory):
    """The tiny preset after its SFT phase: its directory, with dialogues and export."""
    workdir = tmp_path_factory.mktemp("sft") / "run"
    _train(workdir, environment, SWEEP | {"num_steps": 1, "learning_rate": 0.0, "warmup_steps": 0.0})
    return workdir


@pytest.mark.skipif(not os.environ.get("DPO_JAX_SWEEP"), reason="set DPO_JAX_SWEEP=1: half a minute a loss")
@pytest.mark.parametrize("row", RUNS)
def test_every_loss_learns(row, sft, environment, tmp_path, measured):
    start = {"model": sft / "export", "dataset_path": sft / "synthetic-0", "sft_steps": 0, "export": False}
    last = _train(tmp_path / "run", environment, SWEEP | start | RUNS[row])
    measured("losses", "held-out accuracy", row, last["accuracy"], form=".3f")
    assert last["accuracy"] > 0.9, last
