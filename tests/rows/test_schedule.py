"""The plan: exact batches, nothing lost, nothing overfull, few shapes, little padding."""

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.rows.ladder import choose_ladder
from dpo_jax.rows.schedule import efficiency, schedule_epoch
from dpo_jax.rows.shape import Order, RowLimits


def _lengths(n, seed=0):
    """Long-tailed lengths as HH's: means near 150, 42 and 52 tokens."""
    rng = np.random.default_rng(seed)
    raw = rng.lognormal((4.75, 3.4, 3.6), (0.75, 0.8, 0.8), (n, 3))
    return np.clip(raw, 1, (512, 256, 256)).astype(np.int64)


def _plan(lengths, batch_size, limits, order=None, epoch=0):
    order = order or Order()
    return schedule_epoch(lengths, batch_size, choose_ladder(lengths, batch_size, limits, order), order, epoch)


def _check(plan, lengths, batch_size, multiple, drop_remainder):
    """Every promise of a plan."""
    seen = np.concatenate([rows[rows >= 0] for rows in plan.placed])
    assert len(np.unique(seen)) == len(seen)
    n = len(lengths)
    assert len(seen) == (n // batch_size * batch_size if drop_remainder else n)
    assert len(plan.shapes) <= 4
    for i, rows in zip(plan.shape, plan.placed, strict=True):
        shape = plan.shapes[i]
        assert rows.shape == (shape.rows, shape.places)
        assert shape.rows % multiple == 0
        assert (rows >= 0).sum() == batch_size or rows is plan.placed[-1] or not drop_remainder
        sums = np.where(rows[..., None] >= 0, lengths[rows], 0).sum(1)
        assert (sums <= shape.widths).all()
    sizes = [(rows >= 0).sum() for rows in plan.placed]
    assert sorted(sizes, reverse=True)[: n // batch_size] == [batch_size] * (n // batch_size)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_lengths_give_exact_batches(data):
    n = data.draw(st.integers(1, 80))
    widest = data.draw(st.sampled_from([1, 5, 300]))
    lengths = np.array(data.draw(st.lists(st.tuples(*[st.integers(1, widest)] * 3), min_size=n, max_size=n)), np.int64)
    batch_size = data.draw(st.integers(1, n))
    multiple = data.draw(st.sampled_from([1, 2, 4]))
    drop, shuffle = data.draw(st.booleans()), data.draw(st.booleans())
    limits = RowLimits(multiple, data.draw(st.sampled_from([8, 128])), 1e-3)
    order = Order(3, shuffle, drop)
    ladder = choose_ladder(lengths, batch_size, limits, order)
    for epoch in (0, 1):
        plan = schedule_epoch(lengths, batch_size, ladder, order, epoch)
        _check(plan, lengths, batch_size, multiple, drop)
        if not shuffle:
            for i, rows in enumerate(plan.placed):
                expected = np.arange(i * batch_size, min(n, (i + 1) * batch_size))
                np.testing.assert_array_equal(np.sort(rows[rows >= 0]), expected)


def test_a_rejected_slot_of_no_width():
    lengths = _lengths(300) * [1, 1, 0]
    plan = _plan(lengths, 16, RowLimits())
    assert all(s.completions[1] == 0 for s in plan.shapes)
    _check(plan, lengths, 16, 1, True)


def test_a_plan_is_a_function_of_its_arguments():
    lengths = _lengths(700)
    ladder = choose_ladder(lengths, 32, RowLimits(2), Order(5))
    assert ladder == choose_ladder(lengths, 32, RowLimits(2), Order(5))
    once, again, other_epoch, other_seed = (
        schedule_epoch(lengths, 32, ladder, Order(s), e) for s, e in ((5, 2), (5, 2), (5, 3), (6, 2))
    )
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(a.placed, b.placed, strict=True))
    assert same(once, again)
    assert not same(once, other_epoch)
    assert not same(once, other_seed)


@pytest.mark.parametrize("batch_size", [64, 256])
def test_at_least_95_percent_of_computed_tokens_are_real(batch_size):
    """Where rows are as wide as attention's price allows, as on TPU; widths not rounded to its tiles."""
    lengths = _lengths(4096)
    limits = RowLimits(1, 16, 4e-5)
    plan = _plan(lengths, batch_size, limits)
    assert efficiency(plan, lengths) >= 0.95


@pytest.mark.slow
def test_dear_attention_makes_narrow_rows():
    lengths = _lengths(2048)
    cheap, dear = (
        choose_ladder(lengths, 64, RowLimits(1, 16, cost), Order(shuffle=False)).shapes[0] for cost in (1e-5, 1e-2)
    )
    assert cheap.prompt > dear.prompt


def test_batches_stay_random_samples():
    """Balancing exchanges pairs between batches but does not sort them: each batch has short and long pairs."""
    lengths = _lengths(4096)
    plan = _plan(lengths, 64, RowLimits(1, 16, 4e-5))
    median = np.median(lengths.sum(1))
    shares = [np.mean(lengths[rows[rows >= 0]].sum(1) > median) for rows in plan.placed]
    assert min(shares) > 0.25
    assert max(shares) < 0.75


@pytest.mark.parametrize("epoch", [0, 3])
def test_no_hardware_changes_which_pairs_a_batch_has(epoch):
    lengths = _lengths(1500)
    plain = _plan(lengths, 64, RowLimits(), epoch=epoch)
    for limits in (RowLimits(8), RowLimits(8, 128, 4e-5), RowLimits(12, 16, 1e-2), RowLimits(16), RowLimits(64, 128)):
        other = _plan(lengths, 64, limits, epoch=epoch)
        _check(other, lengths, 64, limits.row_multiple, True)
        assert all(s.prompt % limits.width_multiple == 0 for s in other.shapes)
        for a, b in zip(plain.placed, other.placed, strict=True):
            np.testing.assert_array_equal(np.sort(a[a >= 0]), np.sort(b[b >= 0]))


def test_planning_is_fast():
    lengths = _lengths(100_000)
    start = time.perf_counter()
    plan = _plan(lengths, 64, RowLimits(8, 16, 4e-5))
    assert time.perf_counter() - start < 10  # a million take as long when the machine is quiet
    assert efficiency(plan, lengths) > 0.9


def test_real_hh_lengths():
    """Character counts of the real sample, scaled to tokens: its own long tail."""
    path = Path("../shared/data/hh/harmless-base/test.jsonl.gz")
    if not path.exists():
        pytest.skip("the real HH sample is not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    parts = [(r["chosen"].rpartition("\n\nAssistant:"), r["rejected"].rpartition("\n\nAssistant:")[2]) for r in rows]
    lengths = np.array([(len(c[0]), len(c[2]), len(r)) for c, r in parts]) // 4 + 4
    lengths = np.minimum(lengths, 512)
    for batch_size in (64, 256):
        plan = _plan(lengths, batch_size, RowLimits(1, 16, 4e-5))
        _check(plan, lengths, batch_size, 1, True)
        assert efficiency(plan, lengths) >= 0.93
