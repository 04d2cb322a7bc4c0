"""Rows of groups of n completions: packed is unpacked is float64 NumPy, log-probabilities and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpo_jax.model.attention.cpu_tiles import Skipping
from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.forward import ModelOptions, hidden_states, init_params, unembedding
from dpo_jax.objective.logps import group_logps
from dpo_jax.rows.build import build_rows
from dpo_jax.rows.shape import RowShape
from tests.oracles import oracle
from tests.oracles.oracle import CONFIG, RandomGroups

WINDOW = dataclasses.replace(CONFIG, sliding_window=4, sliding_layers=(True, False))
MODELS = {
    "dense": ModelOptions(CONFIG),
    "tiles": ModelOptions(CONFIG, tiling=Skipping(8)),
    "splash": ModelOptions(CONFIG, tiling=Tiling(128, interpret=True)),
    "window": ModelOptions(WINDOW),
    "window in tiles": ModelOptions(WINDOW, tiling=Skipping(8)),
}
PLACED = np.array([[2, 0, -1], [1, 3, 4]])


@functools.cache
def _params():
    fresh = jax.device_get(nn.meta.unbox(init_params(jax.random.key(0), CONFIG)))
    # Larger weights than a fresh model's: attention and the MLP then matter to the result.
    return jax.tree.map(lambda p: p * 6 if p.ndim > 1 and p.shape[-1] != 1 else p, fresh)


@functools.cache
def _groups(n):
    return RandomGroups(np.random.default_rng(n).integers(1, 8, (5, 1 + n)), seed=n)


def _sum(params, batch, weights, shape, model):
    """Weighted log-probabilities, and those themselves `[B, K, n]`."""
    hidden, _ = hidden_states(params, batch, shape, model)
    logps = group_logps(hidden, batch, unembedding(params), shape).logps
    return jnp.sum(logps * weights), logps


_gradient = jax.jit(jax.grad(_sum, has_aux=True), static_argnums=(3, 4))


@functools.cache
def _packed(n, name):
    groups, shape = _groups(n), RowShape(24, (24,) * min(n, 2) + (16,) * (n - 2), rows=2, places=3)
    batch = build_rows(groups, PLACED, shape).map(jnp.asarray)
    weights = np.where(PLACED[..., None] >= 0, _weights(n)[PLACED], 0)
    grads, logps = jax.device_get(_gradient(_params(), batch, weights, shape, MODELS[name]))
    by_group = np.zeros((5, n))
    by_group[PLACED[PLACED >= 0]] = logps[PLACED >= 0]
    assert (logps[PLACED < 0] == 0).all()
    return by_group, grads


def _weights(n):
    return np.random.default_rng(7).normal(size=(5, n)).astype(np.float32)


@functools.cache
def _alone(n, windowed):
    """Every completion a row of its own behind its own copy of the prompt."""
    pairs = [(prompt, x) for prompt, *completions in _groups(n).ids for x in completions]
    shape = RowShape(8, (8,), rows=len(pairs))
    batch = build_rows(pairs, np.arange(len(pairs))[:, None], shape).map(jnp.asarray)
    model = MODELS["window" if windowed else "dense"]
    grads, logps = jax.device_get(_gradient(_params(), batch, _weights(n).reshape(-1, 1, 1), shape, model))
    return logps.reshape(5, n), grads


# Every number of completions with and without a window, and every model.
CASES = [
    (3, "dense"),
    (8, "tiles"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (1, "splash"),
            (1, "window in tiles"),
            (3, "window in tiles"),
            (4, "tiles"),
            (4, "window"),
            (8, "splash"),
            (8, "window"),
        )
    ),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("n", "name"), CASES)
def test_packed_is_unpacked(n, name):
    (ours, grads), (theirs, theirs_grads) = _packed(n, name), _alone(n, name.startswith("window"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(theirs_grads))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * largest)
    jax.tree.map(close, grads, theirs_grads)


@pytest.mark.parametrize(("n", "name"), CASES)
def test_packed_is_the_float64_oracle(n, name):
    """The gradient along three directions of length 1, by differences of the oracle."""
    ours, grads = _packed(n, name)
    config, groups = MODELS[name].config, _groups(n)

    def exact(params):
        return np.array([[oracle.completion_logp(params, p, x, config) for x in xs] for p, *xs in groups.ids])

    np.testing.assert_allclose(ours, exact(_params()), rtol=1e-5, atol=1e-5)
    rng, h = np.random.default_rng(3), 1e-4
    for _ in range(3):
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), _params())
        length = np.sqrt(sum((d**2).sum() for d in jax.tree.leaves(direction)))
        direction = jax.tree.map(lambda d, length=length: d / length, direction)
        moved = [jax.tree.map(lambda p, d, t=t: p.astype(np.float64) + t * d, _params(), direction) for t in (h, -h)]
        up, down = ((_weights(n) * exact(params)).sum() for params in moved)
        pairs = list(zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        along = sum(float((np.asarray(g, np.float64) * d).sum()) for g, d in pairs)
        size = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g, _ in pairs))
        assert along == pytest.approx((up - down) / (2 * h), abs=1e-5 * size)


@pytest.mark.sweep
@pytest.mark.parametrize("n", [3, 8])
def test_values_come_back_in_the_groups_own_order(n):
    """Whatever slots the completions went to: those of a group in another order are the same in that order."""
    groups, order = _groups(n), np.random.default_rng(0).permutation(n)
    swapped = [(prompt, *(xs[j] for j in order)) for prompt, *xs in groups.ids]
    shape = RowShape(24, (16,) * n, rows=2, places=3)
    batches = [build_rows(source, PLACED, shape) for source in (groups, swapped)]
    slots = [batch.slots[PLACED >= 0] for batch in batches]
    assert (np.sort(slots[0], axis=-1) == np.arange(n)).all()
    assert not np.array_equal(slots[0], np.broadcast_to(np.arange(n), slots[0].shape))
    weights = np.zeros((*PLACED.shape, n), np.float32)
    ours, theirs = (
        _gradient(_params(), batch.map(jnp.asarray), weights, shape, MODELS["dense"])[1] for batch in batches
    )
    np.testing.assert_allclose(np.asarray(ours)[..., order], theirs, rtol=1e-5, atol=1e-5)
