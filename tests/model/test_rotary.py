"""Rotary position embedding against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model import rotary
from dpo_jax.model.rotary import apply_rotary, rotary_angles
from tests.model.attention.test_dense import _random


def test_rotary_attention_depends_on_distance_only():
    rng = np.random.default_rng(4)
    x, y = _random(rng, 1, 1, 1, 16), _random(rng, 1, 1, 1, 16)

    def score(i, j):
        at = lambda p: rotary_angles(jnp.asarray([[p]]), head_dim=16, theta=1e4)
        return float((apply_rotary(x, at(i)) * apply_rotary(y, at(j))).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    options = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = tuple(sorted((options | {"original_max_position_embeddings": 8192}).items()))
    plain = np.array(rotary._inverse_frequencies(128, 5e5, ()))
    scaled = np.array(rotary._inverse_frequencies(128, 5e5, scaling))
    wave = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wave < 8192 / 4], plain[wave < 8192 / 4])
    np.testing.assert_allclose(scaled[wave > 8192], plain[wave > 8192] / 8)
    between = (wave >= 8192 / 4) & (wave <= 8192)
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()
