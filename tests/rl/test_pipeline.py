"""RLHF's stages: configs made of one, each done once, refused where it was made of something else, one page at last."""

import json
import sys

import pytest

from dpo_jax import rlhf, train
from dpo_jax.config.stages import chosen_stages, read_stages
from dpo_jax.errors import UserError
from dpo_jax.records.records import read_records
from tests import processes, programs
from tests.training.small import MODEL, small_config

SETTINGS = {
    "task": "rlhf", "num_steps": 2, "rl_n": 2, "win_rate_prompts": 4, "sft_steps": 2, "reward_steps": 2,
    "judge": "tests.collecting.judges:e_count", "eval_every": 1, "sft_learning_rate": 1e-3, "reward_center": 0.01,
    "sample_prompts": 2,
}  # fmt: skip


def config(tmp_path, **changed):
    return small_config(tmp_path, SETTINGS | changed)


def test_every_stage_has_a_config_of_its_own(tmp_path):
    sft, reward, rl = read_stages(config(tmp_path, reward_learning_rate=3e-3, reward_batch_size=4), tmp_path)
    assert [stage.config["task"] for stage in (sft, reward, rl)] == ["sft", "reward", "rl"]
    assert [stage.config["num_steps"] for stage in (sft, reward, rl)] == [2, 2, 2]
    assert [stage.config["learning_rate"] for stage in (sft, reward, rl)] == [1e-3, 3e-3, 1e-2]
    assert [stage.config["batch_size"] for stage in (sft, reward, rl)] == [8, 4, 8]
    assert sft.config["model"] == MODEL
    assert reward.config["model"] == rl.config["model"] == str(tmp_path / "sft" / "export")
    assert rl.config["rl_reward"] == str(tmp_path / "reward" / "export")
    assert (sft.made_of, reward.made_of) == ({}, {"model": "sft"})
    assert rl.made_of == {"model": "sft", "rl_reward": "reward"}
    assert (sft.config["judge"], reward.config["judge"]) == ("", "")
    assert (reward.config["reward_center"], rl.config["reward_center"]) == (0.01, 0.0)


def test_stages_that_are_not_needed_are_left_out(tmp_path):
    (rl,) = read_stages(config(tmp_path, sft_steps=0, rl_reward="a:b"), tmp_path)
    assert (rl.name, rl.made_of, rl.config["model"], rl.config["rl_reward"]) == ("rl", {}, MODEL, "a:b")
    _, reward, _ = read_stages(config(tmp_path, reward_model="owner/other"), tmp_path)
    assert (reward.config["model"], reward.made_of) == ("owner/other", {})


@pytest.mark.parametrize(
    ("changed", "stages", "words"),
    [
        ({}, "ppo", "'ppo' is none of sft, reward, rl"),
        ({"rl_reward": "a:b"}, "reward", "this config has no such stage"),
        ({"task": "dpo"}, "", "has no meaning without task=r"),
        ({"judge": "SELF"}, "", "stage rl: judge=.*reward would grade what"),
        ({"sft_on": "best_of_n"}, "", "sft_on=best_of_n has no meaning for task=rlhf"),
        ({"model": "missing/"}, "", "no such"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(changed, stages, words, tmp_path):
    changed = {key: str(tmp_path / "run" / "reward") if value == "SELF" else value for key, value in changed.items()}
    with pytest.raises(UserError, match=words):
        rlhf.run(config(tmp_path, **changed), tmp_path / "run", stages)
    assert not (tmp_path / "run").exists()


def test_the_command_of_one_run_says_which_command_makes_several(tmp_path):
    with pytest.raises(UserError, match=r"python -m dpo_jax.rlhf makes them"):
        train.run(config(tmp_path), tmp_path / "run")


def test_stages_are_chosen_by_name(tmp_path):
    stages = read_stages(config(tmp_path), tmp_path)
    assert [stage.name for stage in chosen_stages(stages, "rl, sft")] == ["sft", "rl"]
    assert chosen_stages(stages, "") == stages


@pytest.mark.slow
def test_all_stages_once_each_and_one_page(tmp_path, capsys):
    workdir, c = tmp_path / "run", config(tmp_path)
    with pytest.raises(UserError, match=r"stage rl is made of .*sft/export, which is not there"):
        rlhf.run(c, workdir, "rl")
    rlhf.run(c, workdir, "sft,reward")
    found = rlhf.run(c, workdir)
    said = capsys.readouterr().out
    assert "stage 1 of 3, sft: done before" in said
    assert {"win_rate", "win_rate_error", "reward_model_accuracy", "kl", "mean_length"} <= set(found)
    assert found == json.loads((workdir / "result.json").read_text())
    records = read_records(workdir / "metrics.jsonl")
    assert {r["split"] for r in records} == {"sft", "reward", "rl", "eval"}
    assert [r["step"] for r in records if r["split"] == "rl"] == [1, 2]
    page = (workdir / "report.html").read_text()
    assert all(f'href="{name}/report.html"' in page for name in ("sft", "reward", "rl"))
    assert "Win rate by √KL" in page
    rl = read_records(workdir / "rl" / "metrics.jsonl")
    assert next(r for r in rl if r["split"] == "eval")["kl"] == pytest.approx(0, abs=1e-6)

    before = (workdir / "rl" / "metrics.jsonl").read_bytes()
    assert rlhf.run(c, workdir) == found
    assert capsys.readouterr().out.count("done before") == 3
    assert (workdir / "rl" / "metrics.jsonl").read_bytes() == before

    # Another SFT model under the same name: what was made of the old one is not taken for made of this one.
    weights = workdir / "sft" / "export" / "generation_config.json"
    weights.write_text(weights.read_text().rstrip().rstrip("}") + ', "top_k": 7}')
    with pytest.raises(UserError, match=r"reward was made of another sft than is there now; remove .*reward"):
        rlhf.run(c, workdir, "reward")
    with pytest.raises(UserError, match=r"sft/export is not as the stage left it; remove .*sft"):
        rlhf.run(c, workdir, "sft")
    with pytest.raises(UserError, match="holds a run of another config"):
        rlhf.run(config(tmp_path, rl_n=4), workdir)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    done = programs.run(
        [sys.executable, "-m", "dpo_jax.rlhf", "--config=configs/rlhf.py:tiny", f"--workdir={tmp_path}/run",
         "--stages=rl"],
        processes.with_devices(1), capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "run that stage first: --stages=sft" in done.stderr
