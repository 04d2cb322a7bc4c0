"""The prompts of a collection: two passes, one prompt at a time in memory, and which of them are held out."""

import json
import tracemalloc

import pytest

from dpo_jax.answering.found import Found
from dpo_jax.collecting.flags import is_dataset, parse_collecting
from dpo_jax.collecting.prompts import held_out_keys, survey
from dpo_jax.errors import UserError
from tests.places import GOLDEN

MODEL = str(GOLDEN / "trl/tiny")


def request(prompts, *more):
    common = [f"--policy={MODEL}", "--judge=gold", "--out=/tmp/pairs.jsonl", f"--prompts={prompts}"]
    return parse_collecting(["collect", *common, *more])


def written(path, prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def peak(path):
    tracemalloc.start()
    try:
        surveyed = survey(request(path), Found(MODEL, MODEL))
        count = sum(1 for _ in surveyed.kept(7))
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_hardly_grows_with_the_prompts(tmp_path):
    """A prompt in memory takes more than a kilobyte; of one that was read a few numbers of eight bytes are left."""
    words = "a question that is neither short nor long, and that goes on for a while, number"
    few, many = (written(tmp_path / f"{n}.jsonl", [f"{words} {i}" for i in range(n)]) for n in (500, 8000))
    peak(few)  # what is imported and cached once
    (few_left, small), (many_left, large) = peak(few), peak(many)
    assert (few_left, many_left) == (493, 7993)
    assert large - small < 7500 * 100


def test_the_second_pass_gives_the_prompts_that_were_kept_in_order(tmp_path):
    path = written(tmp_path / "rows.jsonl", ["a", "b", "a", "c", "b", "d"])
    held = written(tmp_path / "held.jsonl", ["c"])
    asked = request(path, f"--held_out={held}")
    surveyed = survey(asked, Found(MODEL, MODEL)).without(held_out_keys(asked, Found(MODEL, MODEL)))
    assert [prompt.given for prompt in surveyed.kept()] == ["a", "b", "d"]
    assert [prompt.given for prompt in surveyed.kept(2)] == ["d"]
    assert surveyed.dropped == {"repeated": 2, "held_out": 1}
    written(path, ["a", "b"])
    with pytest.raises(UserError, match="was changed while it was read"):
        list(surveyed.kept())


def test_a_limit_counts_prompts_and_an_empty_file_is_refused(tmp_path):
    path = written(tmp_path / "rows.jsonl", ["a", "b", "c"])
    assert [p.given for p in survey(request(path, "--limit=2"), Found(MODEL, MODEL)).kept()] == ["a", "b"]
    path.write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        survey(request(path), Found(MODEL, MODEL))


def test_a_file_comes_before_a_dataset_of_its_name(tmp_path, monkeypatch):
    assert is_dataset("hhh")
    assert is_dataset("hf:owner/name:train")
    assert is_dataset("my_module:my_function")
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "hhh", ["a"])
    assert not is_dataset("hhh")
    assert not is_dataset("prompts.jsonl")
