"""Attention as dense blocks against NumPy on unpacked sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model.attention import dense as attention
from dpo_jax.model.attention.dense import dense_attention
from dpo_jax.rows.shape import RowShape
from tests.oracles import oracle

H, G, E = 4, 2, 8


def _random(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.sweep
@pytest.mark.parametrize("block", [256, 3])
def test_a_row_equals_its_unpacked_sequences(block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    rng = np.random.default_rng(0)
    slots = RowShape(11, (7, 8))
    # Two pairs and padding in every slot: (prompt, chosen, rejected) lengths (4, 3, 2) and (5, 2, 4).
    segments = np.zeros(slots.length, np.int32)
    parts = {1: [(0, 4), (11, 3), (18, 2)], 2: [(4, 5), (14, 2), (20, 4)]}
    for k, places in parts.items():
        for a, n in places:
            segments[a : a + n] = k
    q, k, v = _random(rng, 1, 26, H, E), _random(rng, 1, 26, G, E), _random(rng, 1, 26, G, E)
    out = np.asarray(dense_attention(q, k, v, jnp.asarray(segments[None]), shape=slots))[0]
    assert np.isfinite(out).all()
    for (pa, pn), (ca, cn), (ra, rn) in parts.values():
        for a, n in ((ca, cn), (ra, rn)):
            index = np.r_[pa : pa + pn, a : a + n]
            expected = oracle.attend(*(x[0, index].astype(np.float64) for x in (q, k, v)))
            np.testing.assert_allclose(out[index], expected, atol=2e-6)


def test_no_token_sees_another_pair_the_other_completion_or_the_future():
    """Through gradients: which inputs change an output is what the output can see."""
    slots = RowShape(6, (4, 4))
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 1, 2, 2, 0, 1, 1, 2, 0]], jnp.int32)
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(_random(rng, 1, 14, n, E)) for n in (H, G, G))
    seen = jax.jacobian(lambda v: dense_attention(q, k, v, segments, shape=slots)[0].sum((1, 2)))(v)
    reached = np.abs(np.asarray(seen)[:, 0]).sum((2, 3)) > 0
    slot = np.repeat([0, 1, 2], [6, 4, 4])
    s = np.asarray(segments[0])
    for i in np.flatnonzero(s):
        for j in range(14):
            allowed = s[i] == s[j] and j <= i and slot[j] in (0, slot[i])
            assert reached[i, j] == allowed, (i, j)


@pytest.mark.parametrize("shape", [RowShape(5, (4,)), RowShape(5, (4, 0))])
def test_one_completion_and_an_empty_slot(shape):
    rng = np.random.default_rng(2)
    q, k, v = _random(rng, 2, 9, H, E), _random(rng, 2, 9, G, E), _random(rng, 2, 9, G, E)
    segments = jnp.ones((2, 9), jnp.int32)
    alone = dense_attention(q, k, v, segments, shape=shape)
    expected = [oracle.attend(*(x[b].astype(np.float64) for x in (q, k, v))) for b in range(2)]
    np.testing.assert_allclose(alone, expected, atol=2e-6)
