"""Attention with a cache against attention over the whole sequence."""

import jax.numpy as jnp
import numpy as np
from dpo_jax.model.attention.cached import cached_attention

from tests.model.attention.test_dense import E, G, H, _random
from tests.oracles import oracle


def test_cached_attention_equals_attention_over_the_whole_sequence():
    rng = np.random.default_rng(3)
    T, S = 6, 9
    q, k, v = _random(rng, 1, T, H, E), _random(rng, 1, T, G, E), _random(rng, 1, T, G, E)
    cache = jnp.zeros((1, S, G, E)), jnp.zeros((1, S, G, E))
    real = jnp.ones((1, S), bool)
    first, cache = cached_attention(q[:, :4], k[:, :4], v[:, :4], cache, jnp.int32(0), real)
    rest, _ = cached_attention(q[:, 4:], k[:, 4:], v[:, 4:], cache, jnp.int32(4), real)
    expected = oracle.attend(*(x[0].astype(np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(np.concatenate([first[0], rest[0]]), expected, atol=2e-6)
