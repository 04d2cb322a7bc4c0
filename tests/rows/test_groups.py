"""Groups of any number of completions: exact batches, nothing lost, nothing overfull, every completion in a slot."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.plan.known import draw_lengths
from dpo_jax.rows.build import build_rows
from dpo_jax.rows.ladder import choose_ladder
from dpo_jax.rows.schedule import efficiency, make_schedule, schedule_epoch
from dpo_jax.rows.shape import Order, RowLimits, RowShape
from dpo_jax.rows.slots import assign_slots, slot_loads
from tests import places
from tests.oracles.oracle import RandomGroups


def _check_rows(groups, step, shape, placed):
    """A step's rows hold its groups' tokens, where the model expects them."""
    batch = build_rows(groups, placed, shape)
    for b, k in np.argwhere(placed >= 0):
        prompt, *completions = groups[placed[b, k]]
        mine = batch.segments[b] == k + 1
        slot = np.repeat(np.arange(1 + shape.n), shape.widths)
        assert batch.completion_tokens[b, k].tolist() == [len(x) for x in completions]
        np.testing.assert_array_equal(batch.tokens[b, mine & (slot == 0)], prompt)
        last = np.flatnonzero(mine & (slot == 0))[-1]
        slots = np.arange(shape.n) if batch.slots is None else batch.slots[b, k]
        assert sorted(slots) == list(range(shape.n))
        for s, ids in zip(slots, completions, strict=True):
            columns = np.flatnonzero(mine & (slot == 1 + s))
            np.testing.assert_array_equal(batch.tokens[b, columns], ids)
            np.testing.assert_array_equal(batch.positions[b, columns], len(prompt) + np.arange(len(ids)))
            np.testing.assert_array_equal(batch.source[b, columns - shape.prompt], [last, *columns[:-1]])
    assert (batch.segments != 0).sum() == groups.lengths[placed[placed >= 0]].sum()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_groups_are_placed_once_in_exact_batches(data):
    n, count = data.draw(st.sampled_from([1, 2, 3, 4, 8])), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    widest = data.draw(st.sampled_from([1, 5, 60]))
    groups = RandomGroups(rng.integers(1, widest + 1, (count, 1 + n)))
    batch_size = data.draw(st.integers(1, count))
    limits = RowLimits(data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([8, 128])))
    order = Order(3, data.draw(st.booleans()), data.draw(st.booleans()))
    schedule = make_schedule(groups, batch_size, limits, order)
    assert len(schedule.shapes) <= 4
    for epoch in (0, 1):
        first = epoch * schedule.steps_per_epoch
        steps = [schedule.place(first + i) for i in range(schedule.steps_per_epoch)]
        ids = np.concatenate([placed[placed >= 0] for _, placed in steps])
        assert len(np.unique(ids)) == len(ids) == schedule.epoch_size
        for i, (shape, placed) in enumerate(steps):
            assert shape.n == n
            assert shape.rows % limits.row_multiple == 0
            assert (placed >= 0).sum() == min(batch_size, schedule.epoch_size - i * batch_size)
            _check_rows(groups, i, shape, placed)  # also that nothing overflows


def test_lengths_of_another_number_of_completions_are_our_own_error():
    three, eight = (RandomGroups(np.full((4, 1 + n), 3)) for n in (3, 8))
    ladder = choose_ladder(three.lengths, 2, RowLimits(), Order())
    with pytest.raises(AssertionError, match="for rows of 3 completions"):
        schedule_epoch(eight.lengths, 2, ladder, Order())
    with pytest.raises(AssertionError, match="groups of other than 3 completions"):
        build_rows(eight, np.array([[0]]), RowShape(8, (8, 8, 8)))
    with pytest.raises(AssertionError, match="at least one completion slot"):
        RowShape(8, ())


def test_completions_are_dealt_to_the_slots_with_room():
    """Of one or two completions none moves; of more, a long one goes where it fits, and slots end evenly full."""
    lengths = np.array([[[9, 1, 2], [1, 8, 3], [4, 2, 2]]])
    slots = assign_slots(lengths, (12, 11, 11))
    loads = np.zeros(3, int)
    np.add.at(loads, slots.ravel(), lengths.ravel())
    assert (loads <= (12, 11, 11)).all()
    pairs = np.array([[5, 3, 9], [2, 8, 1]])
    assert slot_loads(pairs, np.array([[0, 1]]), (7, 11, 10)).tolist() == [[7, 11, 10]]


def _hh_lengths(n):
    """Prompts of HH, and completions with lengths drawn from those of its answers."""
    path = places.SHARED / "hh/harmless-base/test.jsonl.gz"
    if not path.exists():
        pytest.skip("the real HH sample is not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    prompts = [r["chosen"].rpartition("\n\nAssistant:")[0] for r in rows]
    answers = [r[side].rpartition("\n\nAssistant:")[2] for r in rows for side in ("chosen", "rejected")]
    tokens = lambda texts: np.minimum(np.array([len(x) for x in texts]) // 4 + 4, 512)  # about four characters each
    drawn = np.random.default_rng(0).choice(tokens(answers), (len(prompts), n))
    return np.concatenate([tokens(prompts)[:, None], drawn], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["real", "published"])
@pytest.mark.parametrize(("batch_size", "real"), [(16, 0.93), (64, 0.95)])
def test_rows_of_eight_answers_are_well_filled(batch_size, real, source):
    lengths = _hh_lengths(8) if source == "real" else np.minimum(draw_lengths("hhh", 4096, completions=8), 512)
    for limits in (RowLimits(), RowLimits(1, 16, 4e-5)):
        ladder = choose_ladder(lengths, batch_size, limits, Order())
        assert efficiency(schedule_epoch(lengths, batch_size, ladder, Order()), lengths) >= real
