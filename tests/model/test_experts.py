"""Routing and the experts' layers against NumPy, expert by expert; the load-balancing loss against its definition."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.model.experts import Grouped, balance_loss, balance_sums, experts_mlp, route
from dpo_jax.parallel.mesh import make_mesh

B, T, D, X, F = 2, 7, 4, 5, 6


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("choices", [1, 2, 5])
@pytest.mark.parametrize("normalised", [True, False])
def test_every_token_gets_all_its_experts(choices, normalised):
    """Also if one expert is everybody's: nothing is dropped."""
    x, logits = draw(B, T, D), draw(B, T, X, seed=1) + np.array([9.0, 0, 0, 0, 0], np.float32)
    gate, up, down = draw(X, D, F, seed=2), draw(X, D, F, seed=3), draw(X, F, D, seed=4)
    _, chosen, share = route(jnp.asarray(logits), choices, normalised=normalised)
    ours = experts_mlp(jnp.asarray(x), chosen, share, (gate, up, down), act=jnp.tanh)

    probs = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    expected = np.zeros((B, T, D))
    for b, t in np.ndindex(B, T):
        best = np.argsort(-probs[b, t])[:choices]
        total = probs[b, t, best].sum() if normalised else 1.0
        for e in best:
            hidden = np.tanh(x[b, t] @ gate[e]) * (x[b, t] @ up[e])
            expected[b, t] += probs[b, t, e] / total * (hidden @ down[e])
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("grouped", [None, Grouped(interpret=True)], ids=["xla", "kernel"])
def test_gradients_are_those_of_all_experts_computed_for_all_tokens(grouped):
    x, logits, w = draw(B, T, D), draw(B, T, X, seed=1), (draw(X, D, F), draw(X, D, F, seed=3), draw(X, F, D, seed=4))

    def sorted_tokens(x, logits, w):
        _, chosen, share = route(logits, 2, normalised=True)
        return jnp.sum(jnp.sin(experts_mlp(x, chosen, share, w, act=jax.nn.silu, grouped=grouped)))

    def dense(x, logits, w):
        gate, up, down = w
        _, chosen, share = route(logits, 2, normalised=True)
        hidden = jax.nn.silu(jnp.einsum("btd,xdf->btxf", x, gate)) * jnp.einsum("btd,xdf->btxf", x, up)
        share = jnp.sum(jax.nn.one_hot(chosen, X) * share[..., None], axis=2)
        return jnp.sum(jnp.sin(jnp.einsum("btxf,xfd,btx->btd", hidden, down, share)))

    ours, theirs = (jax.grad(f, (0, 1, 2))(x, logits, w) for f in (sorted_tokens, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), ours, theirs)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("grouped", [None, Grouped(interpret=True)], ids=["xla", "kernel"])
@pytest.mark.parametrize("spread", ["experts", "expert_mlp"])
def test_experts_over_devices_have_the_same_gradients(spread, grouped):
    """Where whole experts are spread, most rows of a device are of experts that are elsewhere."""
    x, logits = draw(4, T, D), draw(4, T, 8, seed=1)
    w = tuple(0.3 * draw(*shape, seed=s) for s, shape in enumerate([(8, D, 16), (8, D, 16), (8, 16, D)]))

    def loss(x, w, grouped):
        _, chosen, share = route(jnp.asarray(logits), 2, normalised=True)
        return jnp.sum(jnp.sin(experts_mlp(x, chosen, share, w, act=jax.nn.silu, grouped=grouped)))

    expected = jax.grad(loss, (0, 1))(x, w, None)
    rules = [("rows", ("data", "fsdp")), (spread, "tensor")]
    with jax.set_mesh(make_mesh(2, 1, 4)), nn.logical_axis_rules(rules):
        found = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, w, grouped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("spread", ["experts", "expert_mlp"])
def test_experts_of_which_every_device_has_a_part_of_the_width(spread):
    """As decoding has them: the same rows on all of an axis, and no weights gathered."""
    x, logits = draw(4, 1, 8), draw(4, 1, 8, seed=1)
    w = tuple(0.3 * draw(*shape, seed=s) for s, shape in enumerate([(8, 8, 16), (8, 8, 16), (8, 16, 8)]))

    def out(x, w):
        _, chosen, share = route(jnp.asarray(logits), 2, normalised=True)
        return experts_mlp(x, chosen, share, w, act=jax.nn.silu)

    rules = [("rows", "data"), ("activation", "fsdp"), (spread, "tensor")]
    expected = out(x, w)
    mesh = make_mesh(2, 2, 2)
    experts, ffn = ("tensor", None) if spread == "experts" else (None, "tensor")
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    x = put(x, "data", None, "fsdp")
    w = tuple(put(v, *spec) for v, spec in zip(w, 2 * [(experts, "fsdp", ffn)] + [(experts, ffn, "fsdp")], strict=True))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        compiled = jax.jit(out).lower(x, w).compile()
        np.testing.assert_allclose(compiled(x, w), expected, atol=1e-5)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    assert all(math.prod(map(int, dims.split(","))) <= 4 * 8 for dims in gathered)  # activations of all rows


def test_balance_is_lowest_where_all_experts_are_used_alike_and_sees_no_padding():
    even = jnp.tile(jnp.eye(X, dtype=jnp.float32) * 20, (3, 1))[None]  # 15 tokens, each certain of another expert
    skewed = jnp.zeros_like(even).at[..., 0].set(20.0)

    def loss(logits, counted):
        probs, chosen, _ = route(logits, 1, normalised=True)
        return float(balance_loss(balance_sums(probs, chosen, counted)))

    everyone = jnp.ones(even.shape[:2], bool)
    assert loss(even, everyone) == pytest.approx(1.0, abs=1e-4)
    assert loss(skewed, everyone) == pytest.approx(X, abs=1e-4)
    both = jnp.concatenate([even, skewed], axis=1)
    assert loss(both, jnp.arange(30)[None] < 15) == pytest.approx(1.0, abs=1e-4)
    assert loss(both, jnp.zeros((1, 30), bool)) == 0.0


def test_only_probabilities_have_a_gradient():
    """d/dlogits X·Σ f·P with f held fixed."""
    logits = jnp.asarray(draw(1, 6, X))
    counted = jnp.ones((1, 6), bool)

    def loss(logits):
        probs, chosen, _ = route(logits, 2, normalised=True)
        return balance_loss(balance_sums(probs, chosen, counted))

    _, chosen, _ = route(logits, 2, normalised=True)
    used = np.bincount(np.asarray(chosen).ravel(), minlength=X) / 6
    expected = jax.grad(lambda z: X * jnp.sum(jax.nn.softmax(z, -1).mean((0, 1)) * used))(logits)
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, atol=1e-6)
