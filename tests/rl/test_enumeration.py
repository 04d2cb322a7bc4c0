"""On a vocabulary of five tokens every answer can be counted: the drawn gradient is that of the exact objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.objective.logps import Logps
from dpo_jax.objective.objective import mean_tokens
from dpo_jax.objective.rl_table import RlOptions
from dpo_jax.rl.objective import rl_objective
from dpo_jax.rows.batch import Batch

V, N, DRAWS, BETA = 5, 4, 40_000, 0.3  # tokens, answers to a prompt, times that the prompt is answered
RNG = np.random.default_rng(0)
REWARDS = jnp.asarray(RNG.normal(size=(V, V)))  # of an answer of two tokens
PARAMS = {"first": jnp.asarray(RNG.normal(size=V)), "second": jnp.asarray(RNG.normal(size=(V, V)))}
REFERENCE = {"first": jnp.asarray(RNG.normal(size=V)), "second": jnp.asarray(RNG.normal(size=(V, V)))}


def log_probs(params):
    """log π of a first token `[V]`, and of a second one after it `[V, V]`."""
    return jax.nn.log_softmax(params["first"]), jax.nn.log_softmax(params["second"], axis=-1)


def answer_logps(params, answers):
    """Of the tokens of answers `[..., 2]`, `[..., 2]`."""
    first, second = log_probs(params)
    return jnp.stack([first[answers[..., 0]], second[answers[..., 0], answers[..., 1]]], axis=-1)


ALL = jnp.stack(jnp.meshgrid(jnp.arange(V), jnp.arange(V), indexing="ij"), axis=-1).reshape(-1, 2)


def reward_and_kl(params):
    """The expected reward and KL(π ‖ π_ref), over all answers."""
    ours, theirs = answer_logps(params, ALL).sum(-1), answer_logps(REFERENCE, ALL).sum(-1)
    return jnp.sum(jnp.exp(ours) * REWARDS.reshape(-1)), jnp.sum(jnp.exp(ours) * (ours - theirs))


def penalty_gradient(kl):
    """The expected gradient of the penalty that is in the loss of every token, over all answers."""
    share = jnp.exp(answer_logps(PARAMS, ALL).sum(-1))
    theirs = answer_logps(REFERENCE, ALL)

    def total(params):
        ours = answer_logps(params, ALL)
        apart = theirs - ours
        k3 = jnp.exp(apart) - apart - 1
        each = {"k2": apart**2 / 2, "k3": k3, "k3_weighted": jnp.exp(ours - jax.lax.stop_gradient(ours)) * k3}
        return jnp.sum(share[:, None] * each[kl])

    return jax.grad(total)(PARAMS)


@functools.cache
def drawn(kl, n=N):
    """The gradient of each of `DRAWS` batches of one prompt with n answers."""
    first, second = log_probs(PARAMS)
    keys = jax.random.split(jax.random.key(1))
    one = jax.random.categorical(keys[0], first, shape=(DRAWS, n))
    answers = jnp.stack([one, jax.random.categorical(keys[1], second[one])], axis=-1)
    objective = rl_objective(RlOptions(loss="importance", advantage="leave_one_out", kl=kl, kl_coef=BETA, max_tokens=2))
    owner = jnp.repeat(jnp.arange(n), 2)[None]
    blank = jnp.zeros((1, 2 * n), jnp.int32)

    def loss(params, answers):
        logps = answer_logps(params, answers).reshape(1, -1)
        reference = answer_logps(REFERENCE, answers).reshape(1, -1)
        batch = Batch(
            blank, blank, blank, blank,
            is_group=jnp.ones((1, 1), bool),
            completion_tokens=jnp.full((1, 1, n), 2),
            owner=owner,
            rewards=REWARDS[answers[:, 0], answers[:, 1]].reshape(1, 1, n),
            drawn_logps=jax.lax.stop_gradient(logps),
        )  # fmt: skip
        sums = lambda x: Logps(x.reshape(1, 1, n, 2).sum(-1), of_tokens=x, entropy=x)
        return objective.values(sums(logps), sums(reference), batch, mean_tokens(batch))["loss"].sum()

    return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(PARAMS, answers)


def flat(tree, lead=()):
    return np.concatenate([np.asarray(x, np.float64).reshape(*lead, -1) for x in jax.tree.leaves(tree)], axis=-1)


@pytest.mark.sweep
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k3_weighted"])
def test_the_drawn_gradient_is_the_enumerated_one(kl):
    reward, divergence = (jax.grad(lambda p, i=i: reward_and_kl(p)[i])(PARAMS) for i in (0, 1))
    penalty = divergence if kl == "k1" else penalty_gradient(kl)
    expected = -flat(reward) + BETA * flat(penalty)
    found = flat(drawn(kl), (DRAWS,))
    mean, error = found.mean(0), found.std(0, ddof=1) / DRAWS**0.5
    z = (mean - expected) / error
    assert np.abs(z).max() < 3, z
    assert 0.5 < np.sqrt((z**2).mean()) < 1.5  # as errors are, neither hidden in them nor smaller by far
    assert (np.abs(expected) > 10 * error).mean() > 0.5  # the errors are small enough to tell gradients apart


def test_what_each_penalty_pulls_towards():
    """Of one token, k1, k2 and the weighted k3 have the gradient of KL(π ‖ π_ref), and k3 that of KL(π_ref ‖ π)."""
    p, q = (log_probs(tree)[0] for tree in (PARAMS, REFERENCE))
    reverse = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - q)))(PARAMS["first"])
    forward = jax.grad(lambda x: jnp.sum(jnp.exp(q) * (q - jax.nn.log_softmax(x))))(PARAMS["first"])

    def of(term):
        def expected(x):
            logp = jax.nn.log_softmax(x)
            return jnp.sum(jnp.exp(p) * term(logp, q, p))

        return jax.grad(expected)(PARAMS["first"])

    from dpo_jax.rl.estimators import KL_IN_LOSS

    for name, direction in (("k2", reverse), ("k3_weighted", reverse), ("k3", forward)):
        np.testing.assert_allclose(of(KL_IN_LOSS[name]), direction, atol=1e-6)
    # k1 in the loss pulls nowhere, and is refused there.
    np.testing.assert_allclose(of(lambda logp, q, old: logp - q), 0, atol=1e-6)
