"""Loss spikes: what is one, what is not."""

import math

import numpy as np

from dpo_jax.training.health import ENOUGH, Health


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
