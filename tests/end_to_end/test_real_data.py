"""A few steps on every real sample with a real 260k-parameter Llama: from the published files to updated weights."""

import json

import pytest

from configs import common
from dpo_jax import train
from dpo_jax.records import length_bias
from tests import places

SHARED = places.SHARED
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout"),
]

CASES = {
    "hhh": ("hhh", "hh", {"hhh/harmless-base": 2312, "hhh/helpful-online": 1137}),
    "ultrafeedback": ("ultrafeedback", "ultrafeedback", {"ultrafeedback": 1000}),
    "helpsteer3": ("helpsteer3", "helpsteer3", {"helpsteer3": 2}),
    "sharegpt": (str(SHARED / "sharegpt"), "", {str(SHARED / "sharegpt"): 300}),
    "polite": (str(SHARED / "polite/*.json"), "", {str(SHARED / "polite/*.json"): 1100}),
    "mixture": (
        "hhh/harmless-base:0.7,ultrafeedback:0.3",
        f"{SHARED / 'hh'},{SHARED / 'ultrafeedback'}",
        {"hhh/harmless-base": 2312, "ultrafeedback": 1000},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_few_steps_on(case, tmp_path):
    dataset, path, read = CASES[case]
    config = common.get_config()
    config.update(
        {
            "model": str(SHARED / "stories260k"),
            "dataset": dataset,
            "dataset_path": str(SHARED / path) if path and "," not in path else path,
            "batch_size": 8,
            "drop_remainder": case != "helpsteer3",  # one pair to train on, one held out
            "num_steps": 3,
            "learning_rate": 1e-4,
            "warmup_steps": 0.0,
            "lr_schedule": "constant",
            "eval_pairs": 40,
            "max_prompt_length": 96,
            "max_completion_length": 48,
            "log_every": 1,
            "sample_prompts": 0,
            "kl_prompts": 0,
            "attention": "dense",  # what is quickest to compile
            "export": False,
        }
    )
    train.run(config, tmp_path)
    report = json.loads((tmp_path / "data.json").read_text())
    assert {source["name"]: source["read"] for source in report["sources"]} == read
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = next(r for r in records if r["split"] == "train")
    assert first["dpo_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["accuracy"] == 0
    assert all(r["pairs"] == (8 if config.drop_remainder else 1) for r in records if r["split"] == "train")
    last = [r for r in records if r["split"] == "train"][-1]
    assert last["dpo_loss"] != first["dpo_loss"]
    held_out = [r for r in records if r["split"] == "eval"][-1]
    groups = {key.removeprefix("margin/") for key in held_out if key.startswith("margin/")} - set(length_bias.GROUPS)
    assert groups == (set(read) if len(read) > 1 else set())
    if groups:
        share = {name: held_out[f"pairs/{name}"] / held_out["pairs"] for name in groups}
        assert held_out["margin"] == pytest.approx(sum(share[n] * held_out[f"margin/{n}"] for n in groups), abs=1e-9)
        assert held_out["accuracy"] == pytest.approx(sum(share[n] * held_out[f"accuracy/{n}"] for n in groups))
    if case == "mixture":
        assert share == {"hhh/harmless-base": 0.7, "ultrafeedback": 0.3}
        assert [part["weight"] for part in report["mixture"]] == [0.7, 0.3]
        whole = sum(part["epoch"] for part in report["mixture"])
        assert whole % 8 == 0
        assert abs(report["mixture"][0]["epoch"] - 0.7 * whole) < 1
