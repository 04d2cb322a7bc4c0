"""Win rates at evaluations: what the records hold against the same answers judged by hand, and baselines of files."""

import json

import pytest

from dpo_jax import get_config, train
from dpo_jax.data.comparison import Comparison
from dpo_jax.errors import UserError
from dpo_jax.preference.rules import shorter
from dpo_jax.records.records import read_records
from dpo_jax.training.own_answers import off_policy_words
from dpo_jax.training.winning import BASELINE, answers_in
from tests import places

GOLDEN = places.ROOT / "tests" / "golden" / "trl"


def run(tmp_path, **settings):
    c = get_config()
    c.update(
        model=str(GOLDEN / "tiny"), dataset=str(GOLDEN / "pairs.jsonl"), batch_size=8, num_steps=2, eval_pairs=8,
        kl_prompts=0, sample_prompts=0, sample_tokens=8, export=False, learning_rate=1e-2, warmup_steps=0,
        judge="dpo_jax.preference.rules:shorter", win_rate_prompts=6, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    c.update(settings)
    train.run(c, tmp_path / "run")
    return [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["split"] == "eval"]


@pytest.mark.slow
def test_the_win_rate_is_that_of_the_same_answers_judged_by_hand(tmp_path):
    records = run(tmp_path)
    assert records[0]["win_rate"] == 0.5
    assert records[0]["win_rate_ties"] == 1.0
    baseline = read_records(tmp_path / "run" / BASELINE)
    assert len(baseline) == 6
    before = [one["answers"][0]["text"] for one in baseline]
    # What the policy says afterwards, by a second run whose baseline is that policy.
    file = tmp_path / "other.jsonl"
    longest = [{**one, "answers": [{"text": "x" * 500}]} for one in baseline]
    file.write_text("".join(json.dumps(one) + "\n" for one in longest))
    again = tmp_path / "again"
    again.mkdir()
    beaten = run(again, win_rate_baseline=str(file))
    assert [r["win_rate"] for r in beaten] == [1.0, 1.0]
    assert records[-1]["answer_characters"] == beaten[-1]["answer_characters"]
    assert records[0]["answer_characters"] == pytest.approx(sum(map(len, before)) / 6)


calls = 0


def falls_silent(comparison):
    """Says something in the first evaluation, 2 prompts in both orders, and then nothing any more."""
    global calls
    calls += 1
    if calls > 8:
        raise UserError("the judge is tired")
    return 0.5


@pytest.mark.slow
def test_a_judge_that_falls_silent_ends_no_run(tmp_path, capsys):
    global calls
    calls = 0
    records = run(tmp_path, judge="tests.training.test_winning:falls_silent", win_rate_prompts=2)
    assert [("win_rate" in r) for r in records] == [True, False]
    assert "warning: no win rate at this evaluation: the judge is tired" in capsys.readouterr().out


def silent(comparison):
    return None


@pytest.mark.slow
def test_a_judge_without_any_verdict_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"judge=.*silent: no verdict on any of 2 answers"):
        run(tmp_path, judge="tests.training.test_winning:silent", win_rate_prompts=2)


def test_a_baseline_without_an_answer_is_one_line(tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [{"prompt": "Why?", "answers": {"text": 1}}, {"prompt": "Hi", "answers": [{"text": "Hello."}]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    user = lambda text: [{"role": "user", "content": text}]
    assert answers_in(file, [user("Hi")]) == ["Hello."]
    with pytest.raises(UserError, match=r"no answer to 1 of 2 held-out prompts, first 'Why\?'"):
        answers_in(file, [user("Hi"), user("Why?")])
    with pytest.raises(UserError, match="there is no such file"):
        answers_in(tmp_path / "none.jsonl", [user("Hi")])


def test_the_rule_of_the_docs_prefers_what_is_shorter():
    said = lambda text: [{"role": "assistant", "content": text}]
    assert shorter(Comparison([{"role": "user", "content": "Hi"}], said("Hello there"), said("Hi"))) == 1


def test_answers_of_the_data_that_are_far_from_the_policy_are_told_with_a_figure():
    values = {"own_logp_per_token": -1.2, "chosen_logp_per_token": -2.6, "rejected_logp_per_token": -2.5}
    said = off_policy_words(values)
    assert said.startswith(
        "warning: nats a token, before any update: -1.20 for the policy's own answers, -2.60 for chosen"
    )
    assert "--config.sft_steps" in said
    near = off_policy_words(values | {"chosen_logp_per_token": -2.1})
    assert near.startswith("nats a token")
    assert "warning" not in near
    assert off_policy_words({"chosen_logp_per_token": -1.0}) is None


@pytest.mark.slow
def test_log_probabilities_a_token_are_those_of_the_answers(tmp_path):
    """Own answers are likelier to the policy than any others: it has drawn them."""
    first, *_ = run(tmp_path, kl_prompts=8, judge="", win_rate_prompts=128)
    own = first["own_logp_per_token"]
    assert first["chosen_logp_per_token"] < own < 0
    assert first["rejected_logp_per_token"] < own
