"""The rows of rollouts: shapes are compiled for what will come, not for the answers of one rollout."""

import dataclasses

import numpy as np

from dpo_jax.rl.rollouts import LIKE_BATCHES, lengths_like
from dpo_jax.rows.schedule import efficiency, fitted
from dpo_jax.rows.shape import Order, RowLimits

PROMPTS = np.random.default_rng(0).integers(30, 200, 500)
N, BATCH = 4, 8
LONGEST = np.array([256] + [128] * N)


class Groups:
    def __init__(self, lengths):
        self.lengths = lengths.astype(np.int32)

    def __len__(self):
        return len(self.lengths)


def drawn(rng, longest=128):
    """A rollout's lengths: some prompts have long answers, others short ones."""
    mean = rng.uniform(0.3, 1.0, (BATCH, 1)) * longest
    answers = np.clip(rng.normal(mean, 0.25 * longest, (BATCH, N)), 2, longest)
    return np.concatenate([rng.choice(PROMPTS, (BATCH, 1)), answers.astype(int)], axis=1)


def scheduled(lengths, before):
    like = lengths_like(lengths, PROMPTS, LIKE_BATCHES * BATCH, seed=0)
    order = Order(shuffle=False, drop_remainder=False)
    return fitted(Groups(lengths), BATCH, RowLimits(), order, longest=LONGEST, before=before, like=like)


def test_later_rollouts_are_computed_in_the_shapes_of_the_first():
    rng = np.random.default_rng(1)
    first = scheduled(drawn(rng), None)
    fills = []
    for _ in range(8):
        schedule = scheduled(drawn(rng), first.ladder)
        assert schedule.ladder == first.ladder
        (placed,) = schedule.epoch(0).placed
        assert sorted(placed[placed >= 0]) == list(range(BATCH))
        fills.append(efficiency(schedule.epoch(0), schedule.lengths))
    assert np.mean(fills) > 0.65  # of a few answers whose lengths differ much


def test_answers_that_become_short_get_shapes_of_their_own():
    rng = np.random.default_rng(1)
    first = scheduled(drawn(rng), None)
    short = drawn(rng, longest=40)
    schedule = scheduled(short, first.ladder)
    assert schedule.ladder != first.ladder
    kept = dataclasses.replace(schedule, ladder=first.ladder)
    assert efficiency(schedule.epoch(0), short) > 1.15 * efficiency(kept.epoch(0), short)


def test_the_bootstrap_draws_an_answers_length_from_one_group():
    lengths = np.array([[10, 1, 2, 3], [20, 4, 5, 6]])
    like = lengths_like(lengths, np.array([7, 8]), 4_000, seed=0)
    assert set(like[:, 0]) == {7, 8}
    of_the_first = like[:, 1] <= 3
    assert (like[of_the_first, 1:] <= 3).all()
    assert (like[~of_the_first, 1:] >= 4).all()
    assert abs(of_the_first.mean() - 1 / 2) < 0.04
    assert abs(np.mean(like[of_the_first, 1:] == 2) - 1 / 3) < 0.04
    np.testing.assert_array_equal(like, lengths_like(lengths, np.array([7, 8]), 4_000, seed=0))
