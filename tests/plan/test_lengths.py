"""Lengths of the pairs that a plan is for, and what is published of them."""

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.plan.known import LENGTHS, PAIRS, draw_lengths
from dpo_jax.plan.lengths import DRAWN_PAIRS, find_lengths
from tests.plan.runs import settings


def test_drawn_lengths_are_those_of_the_quantiles():
    for dataset, quantiles in LENGTHS.items():
        drawn = draw_lengths(dataset, 40_000)
        for column, q in zip(drawn.T, quantiles, strict=True):
            np.testing.assert_allclose(
                np.quantile(column, [0.25, 0.5, 0.75, 0.99]), np.array(q)[[8, 16, 24, 33]], rtol=0.05
            )


def test_published_lengths_are_cut_or_dropped_as_the_data_would_be():
    limits = {"max_prompt_length": 64, "max_completion_length": 32}
    cut = find_lengths(settings(**limits))
    assert cut.lengths.max(0).tolist() == [64, 32, 32]
    assert (len(cut), cut.pairs) == (DRAWN_PAIRS, 160_800)
    kept = find_lengths(settings(overlong="drop", **limits))
    assert kept.lengths.max(0).tolist() == [64, 32, 32]
    within = (draw_lengths("hhh", DRAWN_PAIRS) <= [64, 32, 32]).all(1).mean()
    assert kept.pairs / 160_800 == pytest.approx(within, rel=1e-3)


def test_enough_lengths_are_drawn_for_a_batch():
    """However few pairs the limits keep, and whatever a mixture leaves out."""
    few = {"overlong": "drop", "max_prompt_length": 40, "max_completion_length": 12}
    lengths = find_lengths(settings(batch_size=128, **few))
    assert len(lengths) == lengths.pairs > 128  # a sample would hold a few dozen of them: all were drawn
    assert len(find_lengths(settings(batch_size=16_384))) >= 8 * 16_384
    uneven = find_lengths(settings(dataset="hhh:0.02,ultrafeedback:0.98", batch_size=8192, drop_remainder=False))
    assert uneven.mixture.epoch_size(1, False) >= min(8 * 8192, uneven.pairs)


def test_subsets_and_mixtures_have_their_own_epochs():
    assert find_lengths(settings(dataset="hhh/harmless-base,helpful-online")).pairs == 42_537 + 22_007
    assert sum(PAIRS["hhh"].values()) == 160_800
    lengths = find_lengths(settings(dataset="hhh:0.5,ultrafeedback:0.5", drop_remainder=False))
    assert lengths.pairs == 2 * 61_135  # the scarcer part once, as much of the other
    assert lengths.mixture is not None
    assert lengths.mixture.sizes.sum() == len(lengths)
    assert lengths.mixture.sizes[0] / lengths.mixture.sizes[1] == pytest.approx(160_800 / 61_135, rel=1e-3)
    # Other lengths than HH's alone: an answer of UltraFeedback is several times as long.
    mixed = lengths.lengths[lengths.mixture.members(1000, 0, 0, shuffle=True)]
    assert mixed[:, 1].mean() > 2 * find_lengths(settings()).lengths[:, 1].mean()


def test_lengths_of_a_file(tmp_path):
    def refused(words):
        with pytest.raises(UserError, match=words) as e:
            find_lengths(settings(), str(tmp_path / "lengths.npy"))
        assert "\n" not in str(e.value)

    np.save(tmp_path / "lengths.npy", np.full((7, 3), 5, np.int32))
    lengths = find_lengths(settings(max_completion_length=4), str(tmp_path / "lengths.npy"))
    assert (len(lengths), lengths.pairs, lengths.lengths.max(0).tolist()) == (7, 7, [5, 4, 4])
    with pytest.raises(UserError, match="leaves none of its pairs"):
        find_lengths(settings(max_completion_length=4, overlong="drop"), str(tmp_path / "lengths.npy"))
    np.save(tmp_path / "lengths.npy", np.zeros((7, 2)))
    refused(r"float64 \(7, 2\); needed are integers \[pairs, 3\]")
    np.save(tmp_path / "lengths.npy", np.full((7, 3), -1))
    refused("holds -1; prompts and completions have one token or more")
    for content in (b"", b"PK\x03\x04 no archive", b"no array"):
        (tmp_path / "lengths.npy").write_bytes(content)
        refused("lengths.npy cannot be read")
    with (tmp_path / "lengths.npy").open("wb") as f:
        np.savez(f, lengths=np.ones((7, 3), int))
    refused("an archive of arrays")


@pytest.mark.parametrize("completions", [1, 2, 4])
def test_groups_of_any_number_of_completions(completions, tmp_path):
    drawn = find_lengths(settings(), completions=completions).lengths
    assert drawn.shape == (DRAWN_PAIRS, 1 + completions)
    np.testing.assert_array_equal(drawn[:, :2], find_lengths(settings(), completions=2).lengths[:, :2])
    assert drawn[:, 1:].max() <= settings().data.max_completion_length
    np.save(tmp_path / "lengths.npy", drawn)
    assert len(find_lengths(settings(), str(tmp_path / "lengths.npy"), completions)) == DRAWN_PAIRS
    with pytest.raises(UserError, match=rf"needed are integers \[pairs, {completions + 2}\]"):
        find_lengths(settings(), str(tmp_path / "lengths.npy"), completions + 1)
