"""Mixtures: exact proportions in every epoch, no pair twice, everything used in the end."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.mixture import Mixture, apportion
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.rows.shape import Order, RowLimits
from tests.oracles.oracle import RandomGroups


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_apportioning_is_exact_to_one(total, weights):
    counts = apportion(total, weights)
    assert counts.sum() == total
    assert (np.abs(counts - total * np.array(weights) / sum(weights)) < 1 + 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_epoch_uses_no_pair_twice_and_cannot_be_longer(data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    weights = tuple(data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes))))
    part = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    mixture = Mixture(part, weights)
    size, shuffle = mixture.epoch_size(1, False), data.draw(st.booleans())
    for epoch in range(3):
        members = mixture.members(size, 5, epoch, shuffle)
        assert len(set(members.tolist())) == len(members) == size
        np.testing.assert_array_equal(np.bincount(part[members], minlength=len(sizes)), apportion(size, weights))
    exact = min(n * sum(weights) / w for n, w in zip(sizes, weights, strict=True))
    assert exact - len(sizes) <= size <= exact + 1e-6


def test_a_plentiful_part_gives_other_pairs_each_time_until_all_were_used():
    mixture = Mixture(np.repeat([0, 1], [100, 10]), (0.5, 0.5))
    size = mixture.epoch_size(4, True)
    assert size == 20
    epochs = [mixture.members(size, 0, epoch, True) for epoch in range(10)]
    used = np.bincount(np.concatenate(epochs), minlength=110)
    assert (used[:100] == 1).all()
    assert (used[100:] == 10).all()
    assert not np.array_equal(epochs[0], mixture.members(size, 1, 0, True))


def test_in_file_order_every_stretch_has_nearly_the_right_proportions():
    mixture = Mixture(np.repeat([0, 1], [70, 30]), (0.7, 0.3))
    members = mixture.members(100, 0, 0, False)
    share = np.cumsum(members >= 70) / np.arange(1, 101)
    assert np.abs(share - 0.3)[9:].max() < 0.06
    assert (np.diff(members[members < 70]) == 1).all()


def test_the_plan_keeps_the_proportions():
    part = np.repeat([0, 1], [300, 60])
    pairs = RandomGroups(np.random.default_rng(0).integers(1, 40, (360, 3)))
    schedule = make_schedule(pairs, 16, RowLimits(2), Order(3), Mixture(part, (3.0, 1.0)))
    assert schedule.steps_per_epoch == 240 // 16
    for epoch in (0, 1):
        held = np.concatenate([rows[rows >= 0] for rows in schedule.epoch(epoch).placed])
        assert len(set(held.tolist())) == 240
        assert (part[held] == 1).sum() == 60
        np.testing.assert_array_equal(np.sort(held), np.sort(schedule.members(epoch)))
