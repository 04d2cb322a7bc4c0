"""Win rates and their errors: by hand, against SciPy, and against what they must not depend on."""

import math

import numpy as np
import pytest

from dpo_jax.preference import statistics
from dpo_jax.preference.statistics import (
    PENALTY,
    bootstrap_error,
    both_orders_verdict,
    fit_logistic,
    group_means,
    length_controlled,
    win_rate,
    wins_of,
)

NAN = math.nan


def logistic(x):
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------------------------------------------------- win rates


@pytest.mark.parametrize(
    ("forward", "backward", "wins"),
    [
        (-1, 1, 1.0),  # A both times
        (1, -1, 0.0),
        (0, 0, 0.5),
        (1, 1, 0.5),  # the second that is shown, whichever it is
        (-0.5, 0.25, 0.6875),
        (NAN, 1, NAN),
        (-1, NAN, NAN),
    ],
)
def test_the_formula(forward, backward, wins):
    np.testing.assert_equal(wins_of(np.array([forward]), np.array([backward])), [wins])
    np.testing.assert_equal(both_orders_verdict(np.array([forward]), np.array([backward])), [1 - 2 * wins])


def test_over_the_answers_of_a_prompt_first_and_then_over_prompts():
    forward = np.array([-1.0, -1.0, 1.0, 1.0, NAN, 0.0, NAN])
    backward = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 0.0, NAN])
    found = win_rate(forward, backward, np.array([0, 0, 0, 1, 1, 2, 3]))
    # Prompt 0 has two of three, 1 has none of one, 2 a tie, and 3 no verdict.
    assert found.rate == pytest.approx((2 / 3 + 0 + 1 / 2) / 3)
    assert found.wins == pytest.approx((2 / 3) / 3)
    assert found.losses == pytest.approx((1 / 3 + 1) / 3)
    assert found.ties == pytest.approx(1 / 3)
    assert (found.prompts, found.comparisons, found.no_verdict) == (3, 5, 2)
    assert found.agreement == 1
    means = np.array([2 / 3, 0, 1 / 2])
    assert found.error == pytest.approx(means.std() / math.sqrt(3), rel=0.03)


def test_exchanging_the_two_gives_the_rest():
    rng = np.random.default_rng(0)
    forward, backward, prompts = rng.uniform(-1, 1, 300), rng.uniform(-1, 1, 300), rng.integers(0, 90, 300)
    one, other = win_rate(forward, backward, prompts), win_rate(backward, forward, prompts)
    assert one.rate == pytest.approx(1 - other.rate, abs=1e-15)
    assert one.error == pytest.approx(other.error, rel=1e-9)  # the same draws
    assert (one.wins, one.losses, one.agreement) == pytest.approx((other.losses, other.wins, other.agreement))


def test_a_judge_of_positions_says_nothing():
    rng = np.random.default_rng(1)
    found = win_rate(np.ones(50), np.ones(50), rng.integers(0, 9, 50))
    assert (found.rate, found.ties, found.agreement, found.error) == (0.5, 1.0, 0.0, 0.0)


def test_nothing_judged_is_no_win_rate():
    found = win_rate(np.full(3, NAN), np.full(3, NAN), np.arange(3))
    assert math.isnan(found.rate)
    assert math.isnan(found.error)
    assert math.isnan(found.ties)
    assert (found.prompts, found.comparisons, found.no_verdict) == (0, 0, 3)
    empty = win_rate(np.zeros(0), np.zeros(0), np.zeros(0, int))
    assert math.isnan(empty.rate)


def test_means_of_groups():
    assert group_means(np.array([1.0, 5.0, 3.0, 8.0]), np.array([7, 2, 7, 2])).tolist() == [6.5, 2.0]


# ------------------------------------------------------------------------------------------------------- the bootstrap


@pytest.mark.parametrize("n", [2, 30, 1000])
def test_the_bootstrap_is_near_the_analytic_error(n):
    values = np.random.default_rng(n).random(n)
    analytic = values.std() / math.sqrt(n)
    assert bootstrap_error(values) == pytest.approx(analytic, rel=0.03)  # four of its own standard errors, 0.7%
    assert bootstrap_error(values) == bootstrap_error(values)
    assert bootstrap_error(values) != bootstrap_error(values, seed=1)


def test_blocks_change_no_more_than_the_draws(monkeypatch):
    values = np.random.default_rng(0).random(200)
    monkeypatch.setattr(statistics, "_BLOCK", 7 * 200)  # 7 resamples at once, and 4 in the last block
    assert bootstrap_error(values) == pytest.approx(values.std() / math.sqrt(200), rel=0.03)


def test_no_error_of_one_value():
    assert math.isnan(bootstrap_error(np.array([0.3])))
    assert math.isnan(bootstrap_error(np.zeros(0)))
    assert bootstrap_error(np.full(9, 0.25)) == 0


# ------------------------------------------------------------------------------------------------- logistic regression


def test_an_intercept_alone_is_the_logit_of_the_mean():
    targets = np.array([1.0, 0.0, 1.0, 0.8])
    found = fit_logistic(np.ones((4, 1)), targets, np.ones(4), penalty=1e-12)
    assert found == pytest.approx([math.log(0.7 / 0.3)], abs=1e-9)
    # With weights, the weighted mean: (3 * 1 + 0 + 1 + 0.8) / 6.
    found = fit_logistic(np.ones((4, 1)), targets, np.array([3.0, 1, 1, 1]), penalty=1e-12)
    assert found == pytest.approx([math.log(0.8 / 0.2)], abs=1e-9)


def test_the_penalty_is_in_the_gradient():
    features = np.stack([np.ones(5), np.array([-2.0, -1, 0, 1, 2])], 1)
    targets, weights = np.array([0.0, 0, 1, 1, 1]), np.array([1.0, 2, 1, 1, 1])
    found = fit_logistic(features, targets, weights, penalty=0.3)
    gradient = features.T @ (weights * (logistic(features @ found) - targets)) + 0.3 * found
    assert gradient == pytest.approx([0, 0], abs=1e-10)


@pytest.mark.parametrize("penalty", [1e-3, PENALTY, 1.0])
def test_the_minimum_is_scipys(penalty):
    optimize = pytest.importorskip("scipy.optimize", reason="needs scipy, which no command does")
    rng = np.random.default_rng(2)
    features, targets, weights = rng.normal(size=(80, 3)), rng.random(80), rng.uniform(0.2, 3, 80)

    def cost(c):
        chance = logistic(features @ c)
        entropy = targets * np.log(chance) + (1 - targets) * np.log(1 - chance)
        return -(weights * entropy).sum() + penalty / 2 * (c**2).sum()

    expected = optimize.minimize(cost, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
    assert fit_logistic(features, targets, weights, penalty=penalty) == pytest.approx(expected.x, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_what_can_be_separated_stays_finite(scale):
    side = np.linspace(-1, 1, 40) * scale
    found = fit_logistic(np.stack([np.ones(40), side], 1), (side > 0).astype(float), np.ones(40))
    assert np.isfinite(found).all()
    assert found[1] > 0
    assert found[0] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------------- equal lengths


def test_it_finds_what_the_wins_were_made_with():
    differences = np.random.default_rng(3).normal(size=400) * 60
    term = np.tanh(differences / differences.std(ddof=1))
    found = length_controlled(logistic(0.7 + 1.3 * term), differences, np.arange(400), penalty=1e-9)
    assert found.rate == pytest.approx(logistic(0.7), abs=1e-9)
    assert found.slope == pytest.approx(1.3, abs=1e-8)
    assert found.error < 1e-6  # nothing is left to chance
    near = length_controlled(logistic(0.7 + 1.3 * term), differences, np.arange(400))
    assert near.rate == pytest.approx(logistic(0.7), abs=1e-4)  # what the penalty takes


def test_wins_by_length_alone_are_none_at_equal_lengths():
    rng = np.random.default_rng(4)
    differences = np.round(rng.normal(loc=20, scale=15, size=2000))  # A's answers are longer
    wins = (rng.random(2000) < logistic(2 * np.tanh(differences / 15))).astype(float)
    found = length_controlled(wins, differences, np.arange(2000))
    assert wins.mean() > 0.75
    assert found.rate == pytest.approx(0.5, abs=3 * found.error)
    assert found.error < 0.03


def test_exchanging_the_two_gives_the_rest_at_equal_lengths_too():
    rng = np.random.default_rng(5)
    wins, differences, prompts = rng.random(200), rng.normal(size=200) * 9, rng.integers(0, 60, 200)
    one, other = length_controlled(wins, differences, prompts), length_controlled(1 - wins, -differences, prompts)
    assert one.rate == pytest.approx(1 - other.rate, abs=1e-12)
    assert (one.error, one.slope) == pytest.approx((other.error, other.slope), abs=1e-12)


def test_of_answers_that_are_equally_long_it_is_the_win_rate():
    wins = np.array([1.0, 0, 1, 1, 0.5, 1])
    found = length_controlled(wins, np.full(6, 4.0), np.arange(6), penalty=1e-9)
    assert found.rate == pytest.approx(wins.mean(), abs=1e-9)
    assert found.slope == pytest.approx(0, abs=1e-12)


def test_always_winning_is_near_one_and_finite():
    rng = np.random.default_rng(6)
    found = length_controlled(np.ones(100), rng.normal(size=100), np.arange(100))
    assert 0.998 < found.rate < 1
    # theta alone: 100 / (1 + exp(theta)) = 0.01 theta
    alone = length_controlled(np.ones(100), np.zeros(100), np.arange(100))
    theta = math.log(alone.rate / (1 - alone.rate))
    assert 100 / (1 + math.exp(theta)) == pytest.approx(PENALTY * theta, rel=1e-6)


def test_every_prompt_has_the_same_weight():
    rng = np.random.default_rng(7)
    wins, differences = rng.random(40), rng.normal(size=40) * 5
    once = length_controlled(wins, differences, np.arange(40))
    # The first prompt's answer three times: nothing changes but the spread of the differences.
    again = np.concatenate([[0, 0], np.arange(40)])
    scale = differences.std(ddof=1) / differences[again].std(ddof=1)
    twice = length_controlled(wins[again], differences[again], again)
    same = fit_logistic(
        np.stack([np.ones(40), np.tanh(differences / differences.std(ddof=1) * scale)], 1), wins, np.ones(40)
    )
    assert twice.rate == pytest.approx(logistic(same[0]), abs=1e-9)
    assert twice.error == pytest.approx(once.error, rel=0.02)


def test_its_error_is_that_of_a_bootstrap_over_prompts():
    rng = np.random.default_rng(8)
    prompts = np.repeat(np.arange(120), 3)
    differences = rng.normal(size=360) * 30
    of_prompt = rng.normal(size=120)[prompts]  # answers to a prompt are alike
    wins = (rng.random(360) < logistic(0.4 + of_prompt + np.tanh(differences / 30))).astype(float)
    found = length_controlled(wins, differences, prompts)
    spread = differences.std(ddof=1)
    rates = []
    for _ in range(300):
        drawn = rng.integers(0, 120, 120)
        rows = np.concatenate([np.flatnonzero(prompts == p) for p in drawn])
        features = np.stack([np.ones(360), np.tanh(differences[rows] / spread)], 1)
        rates.append(logistic(fit_logistic(features, wins[rows], np.full(360, 1 / 3))[0]))
    assert found.error == pytest.approx(np.std(rates), rel=0.15)  # 300 draws are good for 4%


def test_without_a_verdict_it_is_left_out():
    rng = np.random.default_rng(9)
    wins, differences, prompts = rng.random(30), rng.normal(size=30), np.arange(30)
    some = wins.copy()
    some[[3, 8]] = NAN
    kept = ~np.isnan(some)
    assert length_controlled(some, differences, prompts) == length_controlled(
        wins[kept], differences[kept], prompts[kept]
    )
    assert math.isnan(length_controlled(np.array([1.0, NAN]), np.array([1.0, 2.0]), np.array([0, 1])).rate)
