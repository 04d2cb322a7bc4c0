"""Loss spikes: what is one, what is not; and numbers with which a run may not end."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.errors import NOT_FINITE, UserError
from dpo_jax.training.health import ENOUGH, Health, check_evaluation, check_trained


def _spikes(losses):
    seen = Health("train", 0, lambda *_: None)
    return [n for n, loss in enumerate(losses) if seen.spike_over(loss) is not None]


def test_noise_and_slow_change_are_no_spikes():
    rng = np.random.default_rng(0)
    falling = 0.4 + 0.3 * np.exp(-np.arange(2000) / 300)
    assert _spikes(falling + rng.normal(0, 0.05, 2000)) == []
    assert _spikes([math.log(2)] * 30 + [0.72] * 30) == []
    assert _spikes(np.linspace(0.4, 0.9, 400)) == []


def test_a_jump_is_one_and_does_not_hide_the_next():
    losses = np.random.default_rng(1).normal(0.6, 0.02, 100)
    losses[[40, 41, 80]] = 2.0, 30.0, 1.2
    assert _spikes(losses) == [40, 41, 80]


def test_nothing_is_one_before_there_is_enough_to_compare_with():
    assert _spikes([0.7] * (ENOUGH - 1) + [9.0]) == []
    assert _spikes([0.7] * ENOUGH + [9.0]) == [ENOUGH]


def test_what_is_no_number_is_neither_a_spike_nor_a_measure():
    assert _spikes([0.7] * 20 + [math.nan] * 40 + [math.inf] + [0.71, 9.0]) == [62]


def test_a_run_does_not_end_with_numbers_that_are_not_finite():
    check_evaluation({"dpo_loss": 0.5, "win_rate": math.nan, "kl": None}, first=False)
    with pytest.raises(UserError, match=r"after training is not finite \(margin\).*nothing is exported") as caught:
        check_evaluation({"dpo_loss": 0.5, "margin": math.inf}, first=False)
    assert caught.value.code == NOT_FINITE
    with pytest.raises(UserError, match="before any update is not finite") as caught:
        check_evaluation({"dpo_loss": math.nan}, first=True)
    assert caught.value.code == 2


def test_parameters_are_finite_in_the_dtype_that_they_are_exported_in():
    params = {"embedding": jnp.ones((4, 2)), "layers": {"kernel": jnp.array([1.0, 1e5])}}
    check_trained(params, "float32")
    check_trained({}, "float32")
    with pytest.raises(UserError, match=r"not finite \(layers.kernel\)") as caught:
        check_trained(params, "float16")
    assert caught.value.code == NOT_FINITE
    with pytest.raises(UserError, match=r"not finite \(embedding\)"):
        check_trained(params | {"embedding": jnp.array([jnp.nan])}, "float32")
