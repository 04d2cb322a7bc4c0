"""The types of the preference API: documented examples run, swapping is its own inverse, bad pairs are refused."""

import doctest

import pytest

from dpo_jax.data import comparison as preference
from dpo_jax.data.comparison import Comparison, LabeledComparison, Skip, checked
from dpo_jax.data.forms import chosen, fields, messages, ranked, reader, rename, scores, transcripts, winners

MODULES = [preference, chosen, fields, messages, ranked, reader, rename, scores, transcripts, winners]
ASK = [{"role": "user", "content": "Hi"}]
GOOD = [{"role": "assistant", "content": "Hello!"}]
BAD = [{"role": "assistant", "content": "What?"}]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("label", ["A", "B", "Tie"])
def test_swap_twice_changes_nothing_and_keeps_the_winner(label):
    labeled = LabeledComparison(Comparison(ASK, GOOD, BAD), label)
    assert labeled.swap().swap() == labeled
    assert labeled.swap().comparison == Comparison(ASK, BAD, GOOD)
    if label != "Tie":
        assert labeled.swap().chosen == labeled.chosen
        assert labeled.swap().rejected == labeled.rejected


def test_a_tie_has_no_winner_and_other_labels_do_not_exist():
    with pytest.raises(ValueError, match="no chosen"):
        _ = LabeledComparison(Comparison(ASK, GOOD, BAD), "Tie").chosen
    with pytest.raises(ValueError, match="A, B, Tie"):
        LabeledComparison(Comparison(ASK, GOOD, BAD), "a")


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    ("comparison", "reason"),
    [
        (Comparison(ASK, GOOD, said(" \n")), "empty_rejected"),
        (Comparison(ASK, said(""), BAD), "empty_chosen"),
        (Comparison(ASK, GOOD, said(" Hello!\n")), "identical_answers"),
        (Comparison([], GOOD, BAD), "empty_prompt"),
        (Comparison(said(" ", "user"), GOOD, BAD), "empty_prompt"),
        (Comparison([*ASK, *GOOD], GOOD, BAD), "prompt_not_user_last"),
        (Comparison(ASK, [*GOOD, *ASK], BAD), "answer_not_assistant"),
        (Comparison(ASK, [*ASK, *GOOD], BAD), "answer_not_assistant"),
        (Comparison(ASK, [], BAD), "answer_not_assistant"),
        (Comparison(ASK, said("x", "user"), BAD), "answer_not_assistant"),
        (Comparison(ASK, [*GOOD, *ASK, *said(" ")], BAD), "empty_chosen"),
        (
            Comparison(ASK, [GOOD[0] | {"name": "x"}], [GOOD[0] | {"name": "x", "content": " Hello! "}]),
            "identical_answers",
        ),
        (Comparison(ASK, [GOOD[0] | {"reasoning_content": "\ud800"}], BAD), "invalid_text"),
        (Comparison((), (), (), texts=("", "a", " a ")), "identical_answers"),
        (Comparison((), (), (), texts=("", " ", "a")), "empty_chosen"),
        (Comparison((), (), (), texts=("", "a", "")), "empty_rejected"),
        (Comparison((), (), (), texts=("", "a", "\ud800")), "invalid_text"),
        (Comparison(ASK, said("x", "poet"), BAD), "unknown_role"),
        (Comparison(ASK, said("\ud800"), BAD), "invalid_text"),
        (Comparison(ASK, [{"role": "assistant", "content": None}], BAD), "not_text"),
    ],
)
def test_pairs_that_teach_nothing_are_refused_with_their_reason(comparison, reason):
    result = checked(LabeledComparison(comparison, "A"))
    assert isinstance(result, Skip)
    assert result.reason == reason


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([*GOOD, *ASK, *GOOD], BAD),
        ([*GOOD, *said("12", "tool"), *GOOD], BAD),
        (GOOD, [GOOD[0] | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]),
        (
            [said("")[0] | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
            [said("")[0] | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 2}}}]}],
        ),
        ([GOOD[0] | {"reasoning_content": "a"}], [GOOD[0] | {"reasoning_content": "b"}]),
    ],
)
def test_several_turns_and_other_keys_are_answers(one, two):
    labeled = LabeledComparison(Comparison(ASK, one, two), "A")
    assert checked(labeled) is labeled


def test_the_label_decides_which_answer_an_empty_one_is():
    assert checked(LabeledComparison(Comparison(ASK, GOOD, said("")), "B")) == Skip("empty_chosen")
    assert checked(LabeledComparison(Comparison(ASK, GOOD, said("")), "Tie")) == Skip("empty_completion_b")
