"""On the same pairs in the same order, a reward model is trained to the numbers of TRL's RewardTrainer, step by step.

Golden numbers come from `tests/golden/record_reward.py`, which says what its model and settings are.
"""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import common
from dpo_jax import train
from dpo_jax.records.records import read_records
from tests import places
from tests.end_to_end.test_trl_parity import SAME_AS_TRL

GOLDEN = places.ROOT / "tests" / "golden" / "reward"
TINY = json.loads((GOLDEN / "tiny.json").read_text())
RUNS = {name: run["settings"] for name, run in TINY["runs"].items()}
TOLERANCE = 2e-5
VALUES = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")


def trained(tmp_path, **settings):
    """A run over the golden pairs on all of the test's devices; its records."""
    mesh = {"mesh_data": math.gcd(4, jax.device_count()), "mesh_fsdp": 1, "mesh_tensor": -1}
    c = common.get_config()
    c.update({**SAME_AS_TRL, **mesh, "task": "reward", "cache_dir": str(tmp_path / "cache")})
    c.update({"model": str(GOLDEN / "tiny"), "dataset": str(GOLDEN / "pairs.jsonl"), **settings})
    train.run(c, tmp_path / "run")
    return read_records(tmp_path / "run" / "metrics.jsonl")


def compare(ours, theirs):
    assert [r["step"] for r in ours] == list(range(1, len(theirs) + 1))
    for name in (*VALUES, "grad_norm"):
        a, b = np.array([r[name] for r in ours]), np.array([r[name] for r in theirs])
        size = max(1.0, np.abs(b).max())
        worst = int(np.argmax(np.abs(a - b)))
        assert abs(a[worst] - b[worst]) <= TOLERANCE * size, f"{name} of step {worst + 1}: {a[worst]}, TRL {b[worst]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_agrees_with_trl(name, tmp_path):
    ours = trained(tmp_path, **RUNS[name])
    compare(ours, TINY["runs"][name]["steps"])


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs torch and trl, which are not here")
def test_live_training_agrees_with_trl(tmp_path):
    """Where padding is the end of a turn, and with other pairs, rates and coefficients."""
    import transformers

    from tests.golden.record_reward import run_reward

    directory = tmp_path / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(GOLDEN / "tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / "tiny")
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    rows = [json.loads(line) for line in (GOLDEN / "pairs.jsonl").read_text().splitlines()][::-1][:8]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"learning_rate": 3e-4, "reward_center": 0.2, "reward_margin": "margin"}
    theirs = run_reward(directory, rows, 8, 1, settings).records
    ours = trained(tmp_path, model=str(directory), dataset=str(file), batch_size=8, num_steps=1, **settings)
    # torch's embedding gives no gradient to the padding token, which is in every turn here: the norm is another one.
    compare([{**ours[0], "grad_norm": theirs[0]["grad_norm"]}], theirs)


def test_every_gradient_of_the_first_step_is_that_of_trl(tmp_path):
    from tests.training.test_reward import first_gradients

    ours, theirs = first_gradients(tmp_path), load_file(GOLDEN / "gradients.safetensors")
    assert set(ours) == set(theirs)
    largest = max(np.abs(g).max() for g in theirs.values())
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=TOLERANCE, atol=TOLERANCE * largest, err_msg=name)
