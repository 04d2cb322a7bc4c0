"""Pairs from scores: every mode against its definition, and every reason for which an answer is in no pair."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.errors import UserError
from dpo_jax.sampling.selection import MODES, OF_ANSWERS, OF_PROMPTS, DrawnAnswer, Selection, select_pairs


def answers(lengths):
    return [DrawnAnswer(f"answer {i}", n, True) for i, n in enumerate(lengths)]


def select(scores, given, seed=0, **rules):
    return select_pairs(scores, given, Selection(**rules), np.random.default_rng(seed))


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.integers(-4, 4), min_size=2, max_size=9),
    mode=st.sampled_from(MODES),
    penalty=st.sampled_from([0.0, 0.25]),
    margin=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 99),
)
def test_every_mode_is_its_definition(scores, mode, penalty, margin, seed):
    lengths = np.random.default_rng(seed).integers(1, 9, len(scores))
    found = select(scores, answers(lengths), seed, mode=mode, length_penalty=penalty, min_margin=margin)
    value = np.array(scores) - penalty * lengths
    far = lambda i, j: value[i] > value[j] and value[i] - value[j] >= margin
    best = int(np.flatnonzero(value == value.max())[0])
    worse = [j for j in range(len(value)) if far(best, j)]
    if mode == "all":
        wanted = {(i, j) for i in range(len(value)) for j in range(len(value)) if far(i, j)}
        assert set(found.pairs) == wanted
    elif not worse:
        assert found.pairs == []
        assert found.dropped == {"tie" if value.max() == value.min() else "small_margin": 1}
        return
    elif mode == "best_random":
        ((i, j),) = found.pairs
        assert (i, j in worse) == (best, True)
    else:
        aim = value.min() if mode == "best_worst" else value.mean() - 2 * value.std()
        distances = np.abs(value[worse] - aim)
        assert found.pairs == [(best, worse[int(distances.argmin())])]
    assert len(set(found.pairs)) == len(found.pairs)


def test_a_random_one_is_any_of_the_worse_ones_and_the_same_for_a_seed():
    drawn = [select([0, 5, 1, 2], answers([1] * 4), seed, mode="best_random").pairs for seed in range(60)]
    assert {j for ((_, j),) in drawn} == {0, 2, 3}
    assert drawn == [select([0, 5, 1, 2], answers([1] * 4), seed, mode="best_random").pairs for seed in range(60)]


def test_answers_that_are_in_no_pair_are_counted_by_the_first_reason():
    given = [
        DrawnAnswer("good", 3, True),
        DrawnAnswer(" good ", 4, True),  # as the first, but for blanks
        DrawnAnswer("cut", 9, False),
        DrawnAnswer(" ", 1, True),
        DrawnAnswer("unjudged", 2, True),
        DrawnAnswer("bad", 2, True),
    ]
    scores = [1.0, 9.0, 9.0, 9.0, np.nan, 0.0]
    found = select(scores, given)
    assert found.pairs == [(0, 5)]
    assert found.dropped == {"no_score": 1, "unfinished": 1, "empty": 1, "duplicate": 1}
    assert list(found.dropped) == [reason for reason in OF_ANSWERS if reason in found.dropped]
    assert select(scores, given, keep_unfinished=True).pairs == [(2, 5)]
    assert select(scores[:3], given[:3]).dropped == {"unfinished": 1, "duplicate": 1, "too_few": 1}


def test_what_means_nothing_is_refused():
    for rules, words in (
        ({"mode": "worst"}, "mode=worst does not exist; choose from best_worst"),
        ({"length_penalty": -0.1}, "length_penalty=-0.1; needs a number from 0 on"),
        ({"min_margin": float("nan")}, "min_margin=nan"),
    ):
        with pytest.raises(UserError, match=words):
            Selection(**rules)
    assert not set(OF_ANSWERS) & set(OF_PROMPTS)
