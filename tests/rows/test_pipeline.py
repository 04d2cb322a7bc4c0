"""Rows hold what the schedule puts there, in the places the model expects, whoever loads them."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.rows.batch import Batch
from dpo_jax.rows.build import FirstOnly, build_rows
from dpo_jax.rows.pipeline import StepSource, batches
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.rows.shape import Order, RowLimits, RowShape
from tests.oracles.oracle import RandomGroups

LENGTHS = np.random.default_rng(0).integers(1, 9, (50, 3))
PAIRS = RandomGroups(LENGTHS)


def _schedule(batch_size=8, multiple=2, **changed):
    return make_schedule(PAIRS, batch_size, RowLimits(multiple, 8, 1e-3), Order(1, **changed))


def _source(schedule, microbatches=1, rows=None, steps=13):
    rows_of = {s.rows // microbatches: np.arange(s.rows // microbatches) for s in schedule.shapes}
    return StepSource(schedule, microbatches, rows_of if rows is None else rows(rows_of), steps)


def _same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_row_written_out():
    pairs = RandomGroups([(2, 3, 1), (1, 1, 2)])
    (p0, c0, r0), (p1, c1, r1) = pairs.ids
    rows = build_rows(pairs, np.array([[0, 1, -1]]), RowShape(4, (5, 4), 1, 3))
    zeros = lambda n: [0] * n
    assert rows.tokens.tolist() == [[*p0, *p1, 0, *c0, *c1, 0, *r0, *r1, 0]]
    assert rows.segments.tolist() == [[1, 1, 2, 0, 1, 1, 1, 2, 0, 1, 2, 2, 0]]
    assert rows.positions.tolist() == [[0, 1, 0, 0, 2, 3, 4, 1, 0, 2, 1, 2, 0]]
    # First tokens come from the prompt's last token (1 and 2), the others from the token before.
    assert rows.source.tolist() == [[1, 4, 5, 2, 0, 1, 2, 10, 0]]
    assert rows.is_group.tolist() == [[True, True, False]]
    assert rows.completion_tokens.tolist() == [[[3, 1], [1, 2], zeros(2)]]


def test_every_step_holds_its_pairs_and_resuming_is_a_number():
    source = _source(_schedule())
    seen = []
    for i, item in enumerate(batches(source, 0)):
        assert item.number == i
        assert item.groups == 8
        assert item.batch.is_group.sum() == 8
        assert (item.batch.segments > 0).sum() == item.tokens
        seen.append(item)
    assert len(seen) == 13  # two epochs of six steps, and one step
    for later, item in zip(seen[5:], batches(source, 5), strict=True):
        _same(later.batch, item.batch)
    assert list(batches(source, 13)) == []


def test_processes_load_their_own_rows_and_make_one_batch_together():
    schedule = _schedule(multiple=4)
    halves = [
        _source(schedule, 2, lambda r, k=k: {n: np.array_split(x, 2)[k] for n, x in r.items()})[3].batch for k in (0, 1)
    ]
    together = Batch(*(None if a is None else np.concatenate([a, b], 1) for a, b in zip(*halves, strict=True)))
    _same(together, _source(schedule, 2)[3].batch)


def test_microbatches_are_a_leading_axis():
    schedule = _schedule(multiple=4)
    one, four = _source(schedule, 1)[0].batch, _source(schedule, 4)[0].batch
    assert len(four.tokens) == 4
    _same(four.map(lambda x: x.reshape(1, -1, *x.shape[2:])), one)


def test_rows_of_first_completions_have_one_slot_for_them():
    schedule = make_schedule(FirstOnly(PAIRS), 8, RowLimits(), Order())
    step = _source(schedule)[0]
    assert all(s.n == 1 for s in schedule.shapes)
    assert step.batch.completion_tokens.shape[-1] == 1
    ids = step.placed[step.placed >= 0]
    np.testing.assert_array_equal(step.batch.completion_tokens[step.placed >= 0][:, 0], LENGTHS[ids, 1])


def test_the_short_last_batch_is_there_when_asked_for():
    schedule = _schedule(drop_remainder=False)
    assert schedule.steps_per_epoch == 7
    assert _source(schedule)[6].groups == 50 - 48


def test_a_group_that_does_not_fit_is_our_own_error():
    with pytest.raises(AssertionError, match="overflows"):
        build_rows(PAIRS, np.array([[0, 1, 2, 3, 4, 5]]), RowShape(8, (8, 8), 1, 6))


def test_workers_can_be_sent_the_source_and_reading_pairs_needs_no_jax():
    source = _source(_schedule())
    again = pickle.loads(pickle.dumps(source))
    _same(again[4].batch, source[4].batch)
    code = "import dpo_jax.rows.schedule, dpo_jax.data.prepare, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
