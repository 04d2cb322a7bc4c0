"""Held-out values by length: every pair is counted once, and the correlation is Pearson's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.batches import step_source
from dpo_jax.objective.logps import Logps
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.records.length_bias import GROUPS, length_correlation, length_groups
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.rows.shape import Order, RowLimits
from dpo_jax.training.phases import evaluate
from tests.oracles import oracle

PAIRS = oracle.RandomGroups(np.random.default_rng(0).integers(1, 9, (21, 3)))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 900), st.integers(1, 900)), min_size=1))
def test_every_pair_is_in_one_group_and_swapping_completions_swaps_groups(lengths):
    lengths = np.array(lengths, np.int32)
    groups = length_groups(lengths)
    np.testing.assert_array_equal(sum(groups[name].astype(int) for name in GROUPS), 1)
    swapped = length_groups(lengths[:, [0, 2, 1]])
    np.testing.assert_array_equal(groups["chosen_longer"], swapped["chosen_shorter"])
    np.testing.assert_array_equal(groups["similar_length"], swapped["similar_length"])


def test_a_quarter_more_is_still_similar():
    lengths = np.array([[1, 50, 40], [1, 51, 40], [1, 40, 50], [1, 40, 51]])
    groups = length_groups(lengths)
    assert [next(name for name in GROUPS if groups[name][i]) for i in range(4)] == [
        "similar_length", "chosen_longer", "similar_length", "chosen_shorter",
    ]  # fmt: skip


def test_the_correlation_is_pearsons_and_none_where_nothing_varies():
    rng = np.random.default_rng(0)
    lengths, noise = rng.integers(1, 60, (400, 3)), rng.normal(size=400)
    difference = lengths[:, 1] - lengths[:, 2]
    centred = difference - difference.mean(), noise - noise.mean()
    expected = (centred[0] * centred[1]).sum() / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    assert length_correlation(lengths, noise) == pytest.approx(expected)
    assert length_correlation(lengths, -2.0 * difference) == pytest.approx(-1)
    assert length_correlation(lengths, np.zeros(400)) is None
    assert length_correlation(np.ones((400, 3), int), noise) is None
    assert length_correlation(lengths[:1], noise[:1]) is None


def _evaluate(prefers):
    """An evaluation in which a pair's margin is `prefers` (chosen tokens, rejected tokens)."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    plan = make_schedule(PAIRS, 6, RowLimits(1), Order(drop_remainder=False))

    def eval_step(batch, shape):
        return Logps(batch.completion_tokens.astype(jnp.float32)), None

    def values(scored, _, tokens, margins):
        assert margins is None
        np.testing.assert_array_equal(scored.logps, tokens)  # every pair at its own place
        margin = prefers(*scored.logps.T)
        return {"accuracy": (margin > 0).astype(np.float32), "margin": margin}

    return evaluate(eval_step, values, step_source(plan, mesh, plan.steps_per_epoch, 1), mesh)


def test_an_evaluation_tells_wins_by_length_apart():
    values = _evaluate(lambda chosen, rejected: chosen - rejected)
    difference = PAIRS.lengths[:, 1] - PAIRS.lengths[:, 2]
    assert values["pairs"] == len(PAIRS)
    assert values["length_correlation"] == pytest.approx(1)
    for name, members in length_groups(PAIRS.lengths).items():
        assert members.any()
        assert values[f"pairs/{name}"] == members.sum()
        assert values[f"accuracy/{name}"] == pytest.approx((difference[members] > 0).mean())
        assert values[f"margin/{name}"] == pytest.approx(difference[members].mean())
    assert values["accuracy/chosen_longer"] == 1
    assert values["accuracy/chosen_shorter"] == 0


def test_margins_that_are_rounding_have_no_correlation():
    values = _evaluate(lambda chosen, rejected: -1e-9 * chosen)  # no pair is won
    assert values["accuracy"] == 0
    assert "length_correlation" not in values
