"""Rounds of on-policy preferences: what they train on, and that a run which is stopped anywhere goes on the same."""

from types import SimpleNamespace

import numpy as np
import pytest

import dpo_jax
from dpo_jax import train
from dpo_jax.data.comparison import Comparison
from dpo_jax.errors import UserError
from dpo_jax.preference.models import Function
from dpo_jax.preference.ranking import AnswerGroup, scores_in_groups
from dpo_jax.records.records import read_records
from dpo_jax.training import phases, rounds
from dpo_jax.training.rounds import read_pairs
from tests.collecting import judges
from tests.training.small import MODEL, StopError, small_config, values

SETTINGS = {
    "rounds": 2, "num_steps": 4, "round_prompts": 16, "collect_n": 4, "collect_unfinished": True, "export": False,
    "collect_judge": "tests.collecting.judges:e_count", "judge": "dpo_jax.preference.rules:shorter",
    "win_rate_prompts": 4,
}  # fmt: skip


def config(tmp_path, **changed):
    return small_config(tmp_path, SETTINGS | changed)


def pairs_of(workdir, name):
    return read_records(workdir / "rounds" / f"{name}.jsonl")


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Two blocks a round."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rounds, "BLOCK", 8)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped: SFT on the best answers, then two rounds, the reference following."""
    directory = tmp_path_factory.mktemp("whole")
    more = {"sft_steps": 2, "sft_on": "best_of_n", "round_reference": "previous"}
    train.run(config(directory, **more), directory / "run")
    return directory / "run", more


@pytest.mark.slow
def test_a_round_trains_on_the_answers_of_its_policy(tmp_path):
    """Of the first round the policy is the model itself: `dpo_jax.sample` draws the same, and NumPy pairs them."""
    train.run(
        config(tmp_path, rounds=1, num_steps=2, eval_pairs=0, judge="", win_rate_prompts=128, kl_prompts=0),
        tmp_path / "run",
    )
    found = pairs_of(tmp_path / "run", "1")
    assert len(found) >= 4
    prompts = [line["prompt_token_ids"] for line in found]
    drawn = dpo_jax.sample(MODEL, prompts, n=4, max_tokens=8, round=1)
    for line, answers in zip(found, drawn, strict=True):
        said = [[{"role": "assistant", "content": answer.text}] for answer in answers]
        asked = Comparison(line["prompt_conversation"], said[0], said[0])
        (scores,) = scores_in_groups(Function("e", judges.e_count), [AnswerGroup(asked, said)])
        first = [
            i
            for i, a in enumerate(answers)
            if a.text.strip() and a.text.strip() not in [b.text.strip() for b in answers[:i]]
        ]
        best, worst = (first[int(pick([scores[i] for i in first]))] for pick in (np.argmax, np.argmin))
        assert (line["sample_a"], line["sample_b"]) == (best, worst)
        assert (line["token_ids_a"], line["token_ids_b"]) == (answers[best].token_ids, answers[worst].token_ids)
        assert (line["score_a"], line["score_b"]) == (scores[best], scores[worst])
    held = read_pairs(tmp_path / "run" / "rounds" / "1.jsonl")
    assert [[ids.tolist() for ids in held[i]] for i in range(len(held))] == [
        [line[key] for key in ("prompt_token_ids", "token_ids_a", "token_ids_b")] for line in found
    ]


@pytest.mark.slow
def test_every_round_has_its_records(whole):
    workdir, _ = whole
    records = read_records(workdir / "metrics.jsonl")
    assert [(r["round"], r["step"]) for r in records if r["split"] == "collect"] == [("sft", 0), ("1", 0), ("2", 2)]
    for record in (r for r in records if r["split"] == "collect"):
        assert record["answers"] == 64
        assert record["pairs"] == len(pairs_of(workdir, record["round"]))
        assert record["score_better"] > record["score_worse"]
    evaluations = [r for r in records if r["split"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 2, 4]
    assert all({"win_rate", "win_rate_error", "kl", "answer_characters"} <= set(r) for r in evaluations)
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2, 3, 4]
    assert not list((workdir / "rounds").glob("*.parts"))
    # The reference follows when a round begins, after the evaluation of the one before.
    assert all(r["kl"] > 0 for r in evaluations[1:])
    at = {r["step"]: r for r in records if r["split"] == "train"}
    assert at[1]["margin"] == at[3]["margin"] == 0.0
    assert at[2]["margin"] != 0.0


# Of the SFT phase, the first round and the second: before the second block of its answers, after its first update.
STOPS = ["block 2", "save 1"] * 3


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_value_by_value(whole, tmp_path, monkeypatch):
    """One run that is stopped six times: a wrong value anywhere would stay until its end."""
    workdir, more = whole
    begun = []
    for where in STOPS:
        _stop_at(where, monkeypatch, lambda: train.run(config(tmp_path, **more), tmp_path / "run"))
        begun.append(len(list((tmp_path / "run" / "rounds").glob("*.jsonl"))))
    assert begun == [0, 1, 1, 2, 2, 3]  # of the phases, those that have all of their answers
    train.run(config(tmp_path, **more), tmp_path / "run")
    for name in ("sft", "1", "2"):
        assert pairs_of(tmp_path / "run", name) == pairs_of(workdir, name)
    assert values(tmp_path / "run") == values(workdir)


def _stop_at(where, monkeypatch, run):
    kind, number = where.split()
    target, name = (rounds, "collect_pairs") if kind == "block" else (phases.checkpoint, "save_checkpoint")
    original, left = getattr(target, name), [int(number)]

    def stopping(*args, **named):
        left[0] -= 1
        if left[0] == 0 and kind == "block":
            raise StopError
        done = original(*args, **named)
        if left[0] == 0:
            raise StopError
        return done

    with monkeypatch.context() as patched:
        patched.setattr(target, name, stopping)
        with pytest.raises(StopError):
            run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"collect_judge": "tests.collecting.judges:silent"}, "judge=.*silent: no verdict on any of 32 answers"),
        ({"collect_judge": "tests.collecting.judges:equal"}, r"round 1: no pair could be made of its answers \(.*tie"),
    ],
)
def test_a_judge_that_tells_nothing_apart_ends_the_run_in_a_line(tmp_path, changed, words):
    with pytest.raises(UserError, match=words):
        train.run(config(tmp_path, **changed), tmp_path / "run")


def test_a_round_has_the_next_prompts_each_once(tmp_path):
    """Two pairs of each of ten prompts; four a round: the third round goes on in another order."""
    hashes = np.repeat(np.arange(10, dtype=np.uint64), 2)
    pairs = SimpleNamespace(cache=SimpleNamespace(prompt_hash=hashes), index=np.arange(20))
    settings = SimpleNamespace(seed=3, rounds=SimpleNamespace(prompts=4))
    run = SimpleNamespace(data=SimpleNamespace(train=pairs), settings=settings)
    collector = rounds.RoundCollector(run, None)
    found = [(collector.prompts.places(number) // 2).tolist() for number in range(5)]
    assert all(len(set(one)) == 4 for one in found)
    assert len({*found[0], *found[1], *found[2][:2]}) == 10
    assert found[3] != found[0]
    settings.rounds.prompts = 64
    assert sorted(rounds.RoundCollector(run, None).prompts.places(1) // 2) == list(range(10))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"collect_judge": ""}, "rounds=2: collect_judge is empty"),
        ({"judge": SETTINGS["collect_judge"]}, "a judge that is trained against is no measure of quality"),
        ({"judge": f"gold,{SETTINGS['collect_judge']}"}, "set same_judge=True"),
        ({"num_steps": 5}, "num_steps=5 does not divide over rounds=2"),
        ({"reference_cache": True}, "reference_cache=True keeps values of the dataset's pairs"),
        ({"rounds": 0}, "has no meaning without rounds above 0"),
        ({"round_reference": "previous", "loss": "simpo"}, "loss=simpo has no reference"),
        ({"collect_judge": "runs/rm", "judge": "./runs/rm/export"}, "judge=./runs/rm/export would grade what"),
        ({"round_reference": "previous", "lora_rank": 4}, "the frozen base is the reference"),
        ({"round_reference": "previous", "reference_sync_steps": 2}, "both move the reference"),
        ({"sft_on": "best_of_n"}, "sft_on=best_of_n has no meaning without sft_steps above 0"),
        ({"collect_n": 1}, "collect_n=1: must be at least 2"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, changed, words):
    with pytest.raises(UserError, match=words):
        train.run(config(tmp_path, **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
