"""Losses against float64 NumPy, and what the definition promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES, log_ratio

EXPECTED = {
    "sigmoid": lambda h, e: -(1 - e) * _log_sigmoid(h) - e * _log_sigmoid(-h),
    "robust": lambda h, e: (-(1 - e) * _log_sigmoid(h) + e * _log_sigmoid(-h)) / (1 - 2 * e),
    "hinge": lambda h, e: np.maximum(0, 1 - h),
}


def _log_sigmoid(x):
    return -np.logaddexp(0, -x)


def _random(seed=0, n=64):
    rng = np.random.default_rng(seed)
    return (rng.normal(-80, 30, (n, 2)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_values(name, smoothing, beta):
    policy, reference = _random()
    p, r = policy.astype(np.float64), reference.astype(np.float64)
    h = beta * ((p[:, 0] - r[:, 0]) - (p[:, 1] - r[:, 1]))
    ours = LOSSES[name](jnp.asarray(policy), jnp.asarray(reference), beta=beta, label_smoothing=smoothing)
    assert ours.shape == (64,)
    np.testing.assert_allclose(ours, EXPECTED[name](h, smoothing), rtol=1e-5, atol=1e-5)


def test_equal_models_give_ln_2():
    policy, _ = _random(1)
    loss = LOSSES["sigmoid"](jnp.asarray(policy), jnp.asarray(policy), beta=0.1)
    np.testing.assert_array_equal(loss, np.full(64, np.log(2), np.float32))


def test_swapping_a_pair_negates_the_log_ratio_and_flips_the_labels_smoothing():
    policy, reference = (jnp.asarray(x) for x in _random(2))
    swapped = policy[:, ::-1], reference[:, ::-1]
    np.testing.assert_array_equal(log_ratio(*swapped), -log_ratio(policy, reference))
    ours = LOSSES["sigmoid"](*swapped, beta=0.1, label_smoothing=0.3)
    p, r = (np.asarray(x, np.float64) for x in (policy, reference))
    h = 0.1 * ((p[:, 0] - r[:, 0]) - (p[:, 1] - r[:, 1]))
    np.testing.assert_allclose(ours, EXPECTED["sigmoid"](h, 0.7), rtol=1e-5)


def test_the_gradient_is_the_papers():
    """−β·σ(−β·h) on the chosen log-probability, its negative on the rejected (DPO, section 4)."""
    policy, reference = (jnp.asarray(x) for x in _random(3))
    grad = jax.grad(lambda p: LOSSES["sigmoid"](p, reference, beta=0.1).sum())(policy)
    h = 0.1 * np.asarray(log_ratio(policy, reference), np.float64)
    expected = -0.1 / (1 + np.exp(h))
    np.testing.assert_allclose(grad, np.stack([expected, -expected], -1), rtol=1e-4, atol=1e-8)


def test_extreme_margins_stay_finite():
    policy = jnp.asarray([[0.0, -1e5], [-1e5, 0.0]])
    loss, grad = jax.value_and_grad(lambda p: LOSSES["sigmoid"](p, jnp.zeros((2, 2)), beta=0.5).sum())(policy)
    assert float(loss) == pytest.approx(5e4)
    assert np.isfinite(np.asarray(grad)).all()
