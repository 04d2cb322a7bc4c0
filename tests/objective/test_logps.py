"""Chunked log-probabilities against float64 NumPy, and packed rows against unpacked sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpo_jax.model.forward import ModelOptions, hidden_states, init_params, unembedding
from dpo_jax.objective.logps import group_logps, sum_groups
from dpo_jax.objective.objective import ld_weights
from dpo_jax.objective.token_logps import LogpOptions, TokenValues, token_logps
from dpo_jax.rows.shape import RowShape
from tests.oracles import oracle
from tests.oracles.oracle import CONFIG


@pytest.fixture(scope="module")
def params():
    fresh = nn.meta.unbox(init_params(jax.random.key(0), CONFIG))
    # Larger weights than a fresh model's: attention and the MLP then matter to the result.
    return jax.tree.map(lambda p: p * 8 if p.ndim > 1 and p.shape[-1] != 1 else p, fresh)


@pytest.mark.parametrize("chunk", [1, 5, 7, 1024])
def test_chunks_do_not_change_token_logps(chunk):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 13, 6)).astype(np.float32)
    table = rng.normal(size=(17, 6)).astype(np.float32)
    targets = rng.integers(0, 17, (2, 13))
    z = hidden.astype(np.float64) @ table.T.astype(np.float64)
    logps = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = np.take_along_axis(logps, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        token_logps(hidden, jnp.asarray(targets), table, LogpOptions(chunk))[0], expected, atol=1e-5
    )


def test_log_sum_sq_comes_along_without_a_gradient():
    """log Σ_v p(v)², as TRL's `log_sum_sq_probs`."""
    rng = np.random.default_rng(2)
    hidden, table = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 9, 6), (17, 6)))
    targets = jnp.asarray(rng.integers(0, 17, (2, 9)))
    p = np.exp(hidden.astype(np.float64) @ table.T)
    expected = np.log(((p / p.sum(-1, keepdims=True)) ** 2).sum(-1))
    run = lambda x: token_logps(x, targets, table, LogpOptions(4, log_sum_sq=True))
    np.testing.assert_allclose(run(hidden)[1], expected, atol=1e-5)
    np.testing.assert_array_equal(run(hidden)[0], token_logps(hidden, targets, table, LogpOptions(4))[0])
    assert token_logps(hidden, targets, table, LogpOptions())[1] is None
    np.testing.assert_array_equal(jax.grad(lambda x: run(x)[1].sum())(jnp.asarray(hidden)), np.zeros(hidden.shape))


def test_ld_dpo_weighs_what_lies_beyond_the_shorter_completion():
    """Token by token, with pairs sharing rows in another order than they are numbered."""
    lengths = np.array([(5, 3, 2), (1, 1, 4), (7, 2, 2), (3, 4, 1)])
    placed, shape = np.array([[2, 0, -1], [1, 3, -1]]), RowShape(16, (8, 8), 2, 3)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), oracle.rows(oracle.RandomGroups(lengths), placed, shape))
    tokens = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    ours = sum_groups(TokenValues(jnp.asarray(tokens)), batch, shape, ld_weights(0.3))
    for b, k in np.argwhere(placed >= 0):
        n = lengths[placed[b, k], 1:]
        for side, start in enumerate((0, 8)):
            # Pairs lie in a slot in the order of their places.
            first = start + lengths[placed[b, :k], 1 + side].sum()
            mine = tokens[b, first : first + n[side]]
            weights = np.where(np.arange(n[side]) < n.min(), 1, 0.3)
            assert float(ours.logps[b, k, side]) == pytest.approx((mine * weights).sum(), abs=1e-5)
            assert float(ours.whole[b, k, side]) == pytest.approx(mine.sum(), abs=1e-5)


def test_no_completions_no_logps():
    assert token_logps(jnp.zeros((3, 0, 4)), jnp.zeros((3, 0), jnp.int32), jnp.zeros((5, 4)), LogpOptions())[
        0
    ].shape == (3, 0)


def test_the_gradient_of_chunks_is_that_of_whole_logits():
    rng = np.random.default_rng(1)
    hidden, table = jnp.asarray(rng.normal(size=(2, 9, 6))), jnp.asarray(rng.normal(size=(17, 6)))
    targets = jnp.asarray(rng.integers(0, 17, (2, 9)))
    weight = jnp.asarray(rng.normal(size=(2, 9)))

    def whole(hidden, table):
        logps = jax.nn.log_softmax(jnp.einsum("bnd,vd->bnv", hidden, table))
        return (jnp.take_along_axis(logps, targets[..., None], -1)[..., 0] * weight).sum()

    def chunked(hidden, table):
        return (token_logps(hidden, targets, table, LogpOptions(4))[0] * weight).sum()

    ours, theirs = (jax.grad(f, argnums=(0, 1))(hidden, table) for f in (chunked, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def _logps(params, pairs, placed, shape, remat):
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), oracle.rows(pairs, placed, shape))

    @functools.partial(jax.jit, static_argnames="shape")
    def run(params, batch, shape):
        hidden, _ = hidden_states(params, batch, shape, ModelOptions(CONFIG, remat=remat))
        return group_logps(hidden, batch, unembedding(params), shape).logps

    return np.asarray(run(params, batch, shape))


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_packed_is_unpacked_and_both_are_the_float64_oracle(params, remat):
    pairs = oracle.RandomGroups([(5, 3, 2), (1, 1, 4), (7, 2, 2), (3, 4, 1)])
    packed = _logps(params, pairs, np.array([[2, 0, -1], [1, 3, -1]]), RowShape(16, (8, 8), 2, 3), remat)
    alone = _logps(params, pairs, np.array([[0], [1], [2], [3]]), RowShape(8, (4, 4), 4, 1), remat)[:, 0]
    assert packed[0, 2].tolist() == [0, 0]
    packed = np.stack([packed[0, 1], packed[1, 0], packed[0, 0], packed[1, 1]])
    np.testing.assert_allclose(packed, alone, atol=1e-5, rtol=1e-5)
    for i, (prompt, chosen, rejected) in enumerate(pairs.ids):
        expected = [oracle.completion_logp(params, prompt, x, CONFIG) for x in (chosen, rejected)]
        np.testing.assert_allclose(packed[i], expected, atol=3e-4, rtol=1e-5)
