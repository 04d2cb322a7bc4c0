"""On the same data in the same order, the whole trainer gives the numbers that TRL's DPOTrainer gives, step by step.

Golden numbers come from `tests/golden/record_trl.py`, which says what its models and settings are. Every run here is
the product's own: files → tokens → pair rows → packed, sharded step → metrics.jsonl.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from configs import common
from dpo_jax import train
from dpo_jax.records.records import read_records
from tests import places, processes

ROOT = places.ROOT
GOLDEN = ROOT / "tests" / "golden" / "trl"
SHARED = ROOT.parent / "shared" / "data"
SMOLLM2 = os.environ.get("DPO_JAX_SMOLLM2", "")
TINY = json.loads((GOLDEN / "tiny.json").read_text())
# TRL's names → ours.
NAMES = {
    "loss": "dpo_loss",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}
# TRL's settings where dpo_jax's own defaults differ; nothing is cut, sampled or exported.
SAME_AS_TRL = {
    "shuffle": False,
    "eval_pairs": 0,
    "log_every": 1,
    "sample_prompts": 0,
    "export": False,
    "max_prompt_length": 8192,
    "max_completion_length": 8192,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "learning_rate": 1e-5,
    "batch_size": 4,
    "num_steps": 8,
    "compute_dtype": "float32",
}


def compare(ours: list[dict], theirs: list[dict], *, loss: float, logp: float, reward: float, grad_norm: float) -> None:
    """Every metric of every step within its tolerance (`grad_norm` relative); a failure shows both sides."""
    tolerances = {"dpo_loss": loss, "chosen_logp": logp, "rejected_logp": logp}
    tolerances |= {"chosen_reward": reward, "rejected_reward": reward, "margin": reward, "accuracy": 0.0}
    assert [r["step"] for r in ours] == list(range(1, len(theirs) + 1))
    failed = []
    for name, here in NAMES.items():
        a, b = np.array([r[here] for r in ours]), np.array([r[name] for r in theirs])
        relative = {"grad_norm": grad_norm, "learning_rate": 1e-6}.get(here, 0.0)
        worst = int(np.argmax(np.abs(a - b)))
        print(f"{here}: largest difference {abs(a[worst] - b[worst]):.3g} at step {worst + 1} of {b[worst]}")
        if not np.allclose(a, b, atol=tolerances.get(here, 1e-9), rtol=relative):
            failed.append(f"{here}: ours {a.tolist()}, TRL {b.tolist()}")
    assert not failed, "\n".join(failed)


def check_tokens(ours: list[dict], golden: dict) -> None:
    """Every step has computed exactly the tokens that TRL found in its pairs, with prompts counted once."""
    per_step = np.sum(golden["lengths"], axis=1).reshape(-1, golden["batch_size"]).sum(axis=1)
    assert [r["tokens"] for r in ours] == per_step.tolist()


def run_in_process(tmp_path: Path, settings: dict) -> list[dict]:
    """Train on all of the test's devices: pairs over up to four of them, heads, ffn and vocabulary over the rest."""
    config = common.get_config()
    mesh = {"mesh_data": math.gcd(4, jax.device_count()), "mesh_fsdp": 1, "mesh_tensor": -1}
    config.update({**SAME_AS_TRL, **mesh, "cache_dir": str(tmp_path / "cache"), **settings})
    train.run(config, tmp_path / "run")
    return read_records(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY["runs"])
def test_tiny_agrees_with_trl(name, tmp_path):
    golden = TINY["runs"][name]
    data = {"model": str(GOLDEN / "tiny"), "dataset": str(GOLDEN / "pairs.jsonl")}
    ours = run_in_process(tmp_path, {**data, **golden["settings"]})
    check_tokens(ours, TINY)
    compare(ours, golden["steps"], loss=1e-4, logp=5e-4, reward=1e-4, grad_norm=5e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "stories260k").is_dir(), reason="needs ../shared/data/stories260k, which is not here")
def test_stories260k_agrees_with_trl(tmp_path):
    """A trained model, a SentencePiece tokenizer, HH's plain form."""
    golden = json.loads((GOLDEN / "stories260k.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(SHARED / "stories260k"), local_files_only=True)
    if tokenizer.tokenize("\n\nHuman:")[0] == "▁":
        pytest.skip("recorded with transformers 5.23; from 5.24 on this model's texts begin with one token more")
    run = golden["runs"]["dpo"]
    data = {"model": str(SHARED / "stories260k"), "dataset": str(SHARED / "trl" / "pairs.jsonl")}
    ours = run_in_process(tmp_path, {**data, "prompt_format": "plain", **run["settings"]})
    check_tokens(ours, golden)
    compare(ours, run["steps"], loss=5e-5, logp=1e-3, reward=2e-4, grad_norm=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="set DPO_JAX_SMOLLM2 to a directory with SmolLM2-135M-Instruct")
@pytest.mark.skipif(not (SHARED / "trl" / "trl.json").is_file(), reason="needs ../shared/data/trl, which is not here")
def test_smollm2_agrees_with_trl(tmp_path):
    """The command line on one device, in a process of its own.

    What differs is torch's doing: SmolLM2 pads with the token that ends a turn, and torch's embedding gives no gradient
    to the padding token, wherever it stands. Its row is then trained as an output only; here also as an input.
    """
    settings = {**SAME_AS_TRL, "model": SMOLLM2, "dataset": str(SHARED / "trl" / "pairs.jsonl")}
    settings["cache_dir"] = str(tmp_path / "cache")
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [
        sys.executable,
        "-m",
        "dpo_jax.train",
        "--config=configs/hhh.py",
        f"--workdir={tmp_path / 'run'}",
        *flags,
    ]
    env = processes.of_a_user() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads((SHARED / "trl" / "trl.json").read_text())["logged"]
    compare(read_records(tmp_path / "run" / "metrics.jsonl"), theirs, loss=1e-4, logp=0.01, reward=1e-3, grad_norm=2e-3)
