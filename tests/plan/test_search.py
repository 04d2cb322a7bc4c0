"""The search for the largest batch, over memories of every kind."""

import pytest

from dpo_jax.plan.search import largest_batch

MEMORIES = {
    "even": lambda b: 100 + 0.9 * b,
    "flat, then steep": lambda b: max(500, 1.9 * b),
    "steeper and steeper": lambda b: 300 + 0.3 * b + (b / 50) ** 2,
    "in steps": lambda b: 200 + 100 * (b // 128),
    "never too much": lambda b: 10,
    "always too much": lambda b: 2000,
}


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize(("start", "unit"), [(64, 8), (8, 8), (480, 16), (768, 1)])
def test_the_search_finds_the_largest_batch(name, start, unit):
    memory, room, pairs, tried = MEMORIES[name], 1000.0, 5003, []

    def need(batch):
        tried.append(batch)
        return float(memory(batch)) if memory(batch) <= room else None

    fitting = [b for b in range(unit, pairs + 1, unit) if memory(b) <= room]
    assert largest_batch(need, start, unit, pairs, room) == max(fitting, default=0)
    assert len(tried) == len(set(tried)) <= 20
    assert all(batch % unit == 0 and unit <= batch <= pairs for batch in tried)


def test_a_batch_beyond_the_pairs_of_an_epoch_is_tried_as_it_is():
    """A config may ask for it where the last batch of an epoch is kept."""
    assert largest_batch(float, 64, 8, 40, 1000.0) == 64
