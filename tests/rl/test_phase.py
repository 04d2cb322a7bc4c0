"""Runs of RL: what their records say, and that a run which is stopped anywhere goes on value by value."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import train
from dpo_jax.errors import UserError
from dpo_jax.records.records import read_records
from dpo_jax.rl.rollouts import Rollouts
from dpo_jax.training import checkpoint
from tests.training.small import MODEL, StopError, small_config, values

SETTINGS = {
    "task": "rl", "num_steps": 4, "rl_n": 4, "rl_reward": "tests.rl.test_phase:many_es", "win_rate_prompts": 8,
    "judge": "tests.collecting.judges:e_count", "eval_every": 2, "export": False,
}  # fmt: skip
SEVERAL = {"rl_epochs": 2, "rl_minibatches": 2, "num_steps": 8, "rl_loss": "dapo", "rl_kl": "k3", "eval_every": 0}


def many_es(prompt, answer, row):
    """A verifier: how often an answer has the letter e, if its row is one of the data's."""
    assert {"prompt", "chosen"} <= set(row)
    assert prompt
    return answer.count("e")


def config(tmp_path, **changed):
    return small_config(tmp_path, SETTINGS | changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    train.run(config(directory, export=True, sft_steps=1), directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    directory = tmp_path_factory.mktemp("several")
    train.run(config(directory, **SEVERAL), directory / "run")
    return directory / "run"


@pytest.mark.slow
def test_what_its_records_say(whole):
    records = read_records(whole / "metrics.jsonl")
    updates = [r for r in records if r["split"] == "train"]
    assert [r["step"] for r in updates] == [1, 2, 3, 4]
    for r in updates:
        assert r["answers"] == 32
        assert r["sampling/logp_difference_max"] < 1e-5  # the policy is the one that the answers are of
        assert r["clip_ratio"] == 0
        assert {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy", "kl"} <= set(r)
    assert updates[0]["kl"] == pytest.approx(0, abs=1e-6)
    evaluations = [r for r in records if r["split"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 2, 4]
    assert evaluations[-1]["kl"] > 0
    assert evaluations[-1]["reward"] > evaluations[0]["reward"]
    assert evaluations[-1]["win_rate"] > 0.5


@pytest.mark.slow
def test_the_best_policy_is_exported(whole):
    evaluations = [r for r in read_records(whole / "metrics.jsonl") if r["split"] == "eval" and r["step"]]
    best = max(evaluations, key=lambda r: (r["win_rate"], -r["step"]))
    assert [p.name for p in (whole / "best").iterdir()] == [str(best["step"])]
    assert load_file(whole / "export" / "model.safetensors")


@pytest.mark.slow
def test_several_updates_from_one_rollout(several):
    """Ratios move away from 1, and the rollout is what it was."""
    updates = [r for r in read_records(several / "metrics.jsonl") if r["split"] == "train"]
    assert len(updates) == 8
    assert len({r["reward"] for r in updates[:4]}) == 1
    assert updates[0]["reward"] != updates[4]["reward"]
    for at in (0, 4):
        assert updates[at]["sampling/logp_difference_max"] < 1e-5
        assert updates[at]["clip_ratio"] == 0
    assert max(r["clip_ratio"] for r in updates) > 0
    assert [p.name for p in sorted((several / "checkpoints").iterdir())] == ["4", "8"]


def right_letter(prompt, answer, row):
    """A verifier of rows without answers: whether the letter of the row is in it."""
    return row["answer"] in answer


@pytest.mark.slow
def test_prompts_alone_will_do(tmp_path):
    """Rows as of mathematics: a question, and beside it what only the verifier looks at."""
    rows = [
        {"question": f"Which letter has {word}?", "answer": letter}
        for letter, word in zip("eaio" * 8, range(32), strict=True)
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {
        "rl_reward": "tests.rl.test_phase:right_letter",
        "judge": "",
        "win_rate_prompts": 128,
        "num_steps": 2,
        "dataset": str(data),
    }
    train.run(config(tmp_path, **changed), tmp_path / "run")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    rewards = [r["reward"] for r in records if r["split"] == "train"]
    assert all(0 < reward < 1 for reward in rewards)
    assert [r["reward"] for r in records if r["split"] == "eval"]
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report["splits"]["train"]["pairs"] == 24
    with pytest.raises(UserError, match="question, answer"):  # SFT has answers to learn
        train.run(config(tmp_path, **changed, sft_steps=2), tmp_path / "sft")


@pytest.mark.slow
def test_adapters_alone_are_trained(tmp_path):
    """The base is sampler's, learner's and reference's at once, and stays as it is."""
    train.run(config(tmp_path, lora_rank=4, num_steps=3, eval_every=0, export=True), tmp_path / "run")
    updates = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert updates[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert updates[-1]["kl"] > 1e-5
    assert all(r["sampling/logp_difference_max"] < 1e-5 for r in updates)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["trained_parameters"] < about["parameters"] / 4
    assert (tmp_path / "run" / "export-adapter" / "adapter_model.safetensors").exists()
    before, after = (load_file(f"{where}/model.safetensors") for where in (MODEL, tmp_path / "run" / "export"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stops"), [("whole", ["draw 1", "score 1", "save 2", "draw 0"]), ("several", ["save 1", "score 1"])]
)
def test_stopped_anywhere_it_goes_on_value_by_value(kind, stops, request, tmp_path, monkeypatch):
    workdir = request.getfixturevalue(kind)
    more = {"sft_steps": 1, "export": True} if kind == "whole" else SEVERAL
    for where in stops:
        _stop_at(where, monkeypatch, lambda: train.run(config(tmp_path, **more), tmp_path / "run"))
    train.run(config(tmp_path, **more), tmp_path / "run")
    assert values(tmp_path / "run") == values(workdir)


def _stop_at(where, monkeypatch, run):
    kind, number = where.split()
    left = [int(number)]

    def counted(then):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise StopError
            return then(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        if kind == "draw":
            patched.setattr(Rollouts, "rollout", counted(Rollouts.rollout))
        elif kind == "score":
            from dpo_jax.rl.rewards import Reward

            patched.setattr(Reward, "__call__", counted(Reward.__call__))
        else:
            patched.setattr(checkpoint, "save_checkpoint", counted(checkpoint.save_checkpoint))
        with pytest.raises(StopError):
            run()


@pytest.mark.slow
def test_a_reward_that_says_nothing_ends_the_run_in_a_line(tmp_path):
    with pytest.raises(UserError, match="none of 32 answers has a reward"):
        train.run(config(tmp_path, rl_reward="tests.rl.test_estimators:says_nothing"), tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rl_reward": ""}, "rl_reward is empty"),
        ({"rl_reward": "gold", "judge": "gold"}, "a judge that is trained against is no measure"),
        ({"rl_reward": "runs/rm*2", "judge": "./runs/rm/export"}, "judge=./runs/rm/export would grade what"),
        ({"rl_top_p": 0.9}, "correct for it with rl_correction=2"),
        ({"rl_kl": "k1_loss"}, "expected gradient of zero"),
        ({"rl_kl": "k2", "rl_kl_coef": 0.0}, "rl_kl=k2 has no meaning with rl_kl_coef=0"),
        ({"rl_epochs": 3}, "num_steps=4 does not divide over the 3 updates"),
        ({"rl_n": 1}, "rl_n=1: must be at least 2"),
        ({"rl_unfinished": "minus one"}, "needed is score"),
        ({"rl_reward": "a:b*0"}, "has no weight other than 0"),
        ({"loss": "simpo"}, "loss='simpo' has no meaning for task=rl"),
        ({"task": "dpo"}, "has no meaning without task=rl"),
        ({"rounds": 2}, "rounds=2 has no meaning for task=rl"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(changed, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train.run(config(tmp_path, **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_directory_is_a_runs(whole):
    assert json.loads((whole / "row_shapes.json").read_text())["changes"][0]["rollout"] == 0
    assert (whole / "report.html").stat().st_size > 10_000
    assert np.isfinite([r["loss"] for r in read_records(whole / "metrics.jsonl") if r["split"] == "train"]).all()
