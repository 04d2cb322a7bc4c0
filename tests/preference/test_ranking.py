"""Scores of the answers to one prompt: a scorer's own, or a tournament's."""

import numpy as np
import pytest

from dpo_jax.data.comparison import Comparison
from dpo_jax.preference.models import Function, Pointwise
from dpo_jax.preference.ranking import AnswerGroup, groups_at_once, scores_in_groups

USER = {"role": "user", "content": "Say it."}


def group(*texts):
    said = [[{"role": "assistant", "content": text}] for text in texts]
    return AnswerGroup(Comparison([USER], said[0], said[0]), said)


def shorter(comparison):
    a, b = (len(side[0]["content"]) for side in (comparison.completion_a, comparison.completion_b))
    return None if 13 in (a, b) else float(np.sign(a - b))


def test_a_tournament_is_wins_less_losses_over_matches():
    one, two = scores_in_groups(Function("shorter", shorter), [group("aaa", "a", "bbb"), group("a" * 13, "bb", "c")])
    # Of the first, "a" beats both others, which tie; of the second the first has no verdict, and counts for no one.
    np.testing.assert_array_equal(one, [-0.5, 1, -0.5])
    np.testing.assert_array_equal(two, [np.nan, -1, 1])


def test_a_tournament_asks_every_two_in_both_orders():
    asked = []

    def note(comparison):
        asked.append(tuple(side[0]["content"] for side in (comparison.completion_a, comparison.completion_b)))
        return 0.0

    scores_in_groups(Function("note", note), [group(*"abcd"), group("x", "y")])
    assert sorted(asked) == sorted([(i, j) for i in "abcd" for j in "abcd" if i != j] + [("x", "y"), ("y", "x")])


def test_a_scorers_scores_are_its_own_each_answer_once():
    seen = []

    def score(answered):
        seen.extend(one.completion[0]["content"] for one in answered)
        return np.array([len(one.completion[0]["content"]) / 3 for one in answered])

    one, two = scores_in_groups(Pointwise("length", score), [group("a", "aa", "a"), group("bbb", "bbbb")])
    assert one == pytest.approx([1 / 3, 2 / 3, 1 / 3], rel=1e-8)
    assert two == pytest.approx([1, 4 / 3], rel=1e-8)
    assert sorted(seen) == ["a", "aa", "bbb", "bbbb"]
    assert [float(f"{x:.9g}") for x in (*one, *two)] == [*one, *two]


def test_as_many_groups_at_once_as_fill_a_block():
    scorer, judge = Pointwise("p", lambda answered: np.zeros(len(answered))), Function("f", lambda c: 0.0)
    assert (groups_at_once(scorer, 8), groups_at_once(judge, 8)) == (16, 1)
