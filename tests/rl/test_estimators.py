"""Advantages, weights and what a reward is made of, against NumPy and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config.rewards import weighted_names
from dpo_jax.errors import UserError
from dpo_jax.objective.rl_table import ADVANTAGE_ACROSS, RL_LOSSES, parse_kl, parse_unfinished
from dpo_jax.rl import estimators
from dpo_jax.rl.rewards import Reward, Verifier, adjusted, load_part
from dpo_jax.sampling.params import Answer

R = np.array([[1.0, 2.0, 4.0, np.nan], [0.1, 0.1, 0.1, 0.1], [3.0, np.nan, np.nan, np.nan], [-1.0, 1.0, 0.0, 2.0]])


def advantages(name):
    scored = np.isfinite(R)
    return np.asarray(estimators.ADVANTAGES[name](jnp.asarray(np.nan_to_num(R)), jnp.asarray(scored)))


def each(of_group):
    out = np.zeros(R.shape)
    for row, r in zip(out, R, strict=True):
        there = np.isfinite(r)
        if there.sum() > 1 and np.ptp(r[there]) > 0:
            row[there] = of_group(r[there])
    return out


def test_the_tables_are_of_one_set_of_names():
    assert set(estimators.ADVANTAGES) == set(ADVANTAGE_ACROSS)
    assert {loss.clip for loss in RL_LOSSES.values()} == {"both", "weight", "none"}


@pytest.mark.parametrize(
    ("name", "of_group"),
    [
        ("centred", lambda r: r - r.mean()),
        ("group", lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4)),
        ("leave_one_out", lambda r: r - (r.sum() - r) / (len(r) - 1)),
        ("batch", lambda r: (r - r.mean()) / (np.nanstd(R, ddof=1) + 1e-4)),
    ],
)
def test_advantages_by_numpy(name, of_group):
    np.testing.assert_allclose(advantages(name), each(of_group), atol=1e-5)


def test_whitened_over_the_batch():
    alone, scored = each(lambda r: r - (r.sum() - r) / (len(r) - 1)), np.isfinite(R)
    expected = (alone - alone[scored].mean()) / (alone[scored].std(ddof=1) + 1e-4)
    np.testing.assert_allclose(advantages("whitened"), np.where(scored, expected, 0), atol=1e-5)


@pytest.mark.parametrize("name", ["centred", "group", "leave_one_out", "batch"])
def test_equal_rewards_teach_exactly_nothing(name):
    """A mean of thirds is off by rounding, which a standard deviation near zero would magnify."""
    rewards = jnp.full((64, 7), 0.1) * jnp.arange(1, 65)[:, None]
    assert not np.any(estimators.ADVANTAGES[name](rewards, jnp.ones((64, 7), bool)))


def test_tokens_and_answers():
    owner = jnp.asarray([[0, 0, 3, -1, 1, 2]])
    values = jnp.asarray([[[1.0, 2.0], [3.0, 4.0]]])
    np.testing.assert_array_equal(estimators.of_tokens(values, owner), [[1, 1, 4, 0, 2, 3]])
    summed = estimators.sums_of_tokens(jnp.asarray([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]]), owner, (2, 2))
    np.testing.assert_array_equal(summed, [[[3, 16], [32, 4]]])


def test_truncated_weights_are_verls():
    """clamp(exp(log π_old − log π_rollout), max=cap), detached: verl's rollout_is of tokens."""
    log_ratio = np.array([-3.0, 0.0, 0.5, 2.0, 80.0])
    np.testing.assert_allclose(
        estimators.truncated_weight(jnp.asarray(log_ratio), 2.0), np.minimum(np.exp(log_ratio), 2.0), rtol=1e-6
    )


def test_gspo_is_verls_by_tokens():
    """verl writes −min(s A, clip(s) A) of s = exp(mean log-ratio) for every token, averaged by answer, then answers."""
    rng = np.random.default_rng(0)
    lengths, low, high = [3, 5], 3e-4, 4e-4
    log_ratio = [rng.normal(size=n) * 1e-3 for n in lengths]
    advantage = np.array([1.0, -0.5])
    s = np.exp([x.mean() for x in log_ratio])
    token_losses = [
        np.full(n, -min(si * a, np.clip(si, 1 - low, 1 + high) * a))
        for n, si, a in zip(lengths, s, advantage, strict=True)
    ]
    expected = np.mean([x.mean() for x in token_losses])
    loss, _ = estimators.clipped(jnp.asarray(s), jnp.asarray(advantage), low, high)
    assert float(loss.mean()) == pytest.approx(expected, abs=1e-6)


def answer(tokens, reason="stop"):
    return Answer("x", [1] * tokens, reason, None, 0.0, [0.0] * tokens, [0.0] * tokens)


@pytest.mark.parametrize(
    ("unfinished", "expected"), [("score", [0.6, 1.5]), ("drop", [0.6, np.nan]), (-1.0, [0.6, -1.0])]
)
def test_what_an_answer_without_an_end_is_worth(unfinished, expected):
    found = adjusted(np.array([[1.0, 2.0]]), [[answer(4), answer(5, "length")]], unfinished, 0.1)
    np.testing.assert_allclose(found, [expected])


@pytest.mark.parametrize("text", ["", "None", "nan", "inf", "drop it"])
def test_other_words_for_it_are_refused(text):
    with pytest.raises(UserError, match="needed is score"):
        parse_unfinished(text)


def test_k1_in_the_loss_is_refused_with_the_reason():
    with pytest.raises(UserError, match="expected gradient of zero"):
        parse_kl("k1_loss")
    with pytest.raises(UserError, match="does not exist; choose k1"):
        parse_kl("k4")


def test_weighted_sums():
    assert weighted_names("a/b*0.5,m:f,implicit:p,q*2") == [("a/b", 0.5), ("m:f", 1.0), ("implicit:p,q", 2.0)]


@pytest.mark.parametrize("text", ["a*", "a*x", "a*0", "a*nan", "*2", "a,a", "a,,b", ""])
def test_bad_sums_are_refused(text):
    with pytest.raises(UserError):
        weighted_names(text)


def right(prompt, answer, row):
    """A verifier: whether the answer is that of the row."""
    return answer == row["answer"]


def says_nothing(prompt, answer, row):
    return None


def fails(prompt, answer, row):
    return row["missing"]


def says_words(prompt, answer, row):
    return "good"


def of_a_comparison(comparison):
    return 0.0


HERE = "tests.rl.test_estimators"


def test_a_function_of_three_arguments_is_a_verifier():
    assert isinstance(load_part(f"{HERE}:right"), Verifier)
    assert not isinstance(load_part(f"{HERE}:of_a_comparison"), Verifier)
    assert Reward(f"{HERE}:right").scores_alone
    assert not Reward(f"{HERE}:right,dpo_jax.preference.rules:shorter").scores_alone


class Asked:
    class comparison:  # noqa: N801 (a stand-in for one)
        prompt_conversation = ({"role": "user", "content": "1 + 1?"},)

    @staticmethod
    def completion(text):
        return [{"role": "assistant", "content": text.strip()}]


def verified(name, text="2"):
    verifier = load_part(f"{HERE}:{name}")
    return verifier.score(Asked, text, {"answer": "2"})


def test_a_verifier_sees_the_row():
    assert (verified("right"), verified("right", "3")) == (1.0, 0.0)
    assert np.isnan(verified("says_nothing"))


@pytest.mark.parametrize(("name", "words"), [("fails", "it ended in KeyError"), ("says_words", "it said 'good'")])
def test_a_verifier_that_fails_ends_in_a_line(name, words):
    with pytest.raises(UserError, match=words):
        verified(name)
