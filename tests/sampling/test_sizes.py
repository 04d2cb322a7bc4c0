"""The sizes that programs run in: a larger one serves until compiling would have paid."""

import pytest

from dpo_jax.sampling.sizes import Sizes

AREA = lambda size: float(size[0] * size[1])


def test_the_first_size_is_the_wanted_one_and_serves_what_fits():
    sizes = Sizes(worth=1000)
    assert sizes.choose((16, 4), AREA) == (16, 4)
    assert sizes.choose((16, 4), AREA) == (16, 4)
    assert sizes.choose((8, 2), AREA) == (16, 4)
    assert sizes.choose((8, 8), AREA) == (8, 8)  # more of one: it does not fit
    assert sizes.choose((4, 2), lambda size: float(size[0])) == (8, 8)  # the one that takes least


@pytest.mark.parametrize("worth", [0, 10, 100, 1e4])
def test_never_more_than_twice_the_best_in_hindsight(worth):
    sizes, ran, compiled, wanted = Sizes(worth), 0.0, {(64, 1)}, (10, 1)
    assert sizes.choose((64, 1), AREA) == (64, 1)
    for times in range(1, 50):
        size = sizes.choose(wanted, AREA)
        ran += AREA(size) + (worth if size not in compiled else 0)
        compiled.add(size)
        best = min(times * AREA((64, 1)), worth + times * AREA(wanted))
        assert ran <= 2 * best + AREA((64, 1))
    assert (wanted in compiled) == (worth <= 49 * 54)
