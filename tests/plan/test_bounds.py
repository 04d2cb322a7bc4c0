"""Time bounds and sums of collectives, by hand."""

import dataclasses
from collections import Counter

import pytest

from dpo_jax.parallel.tpu import parse_topology
from dpo_jax.plan.bounds import bounds, by_kind
from dpo_jax.plan.hlo.collectives import Collective
from dpo_jax.plan.hlo.count import Costs
from dpo_jax.plan.hlo.text import HBM


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple
    slice_index: int = 0


def _collective(kind, size, groups, times=1.0):
    return Collective(kind, "", size, groups, times, True)


def _costs(*collectives, flops=0.0, hbm=0.0, kernels=0.0):
    return Costs(flops=flops, kernel_flops=kernels, read=Counter({HBM: hbm}), collectives=list(collectives))


SQUARE = [Chip((x, y, 0)) for x in range(2) for y in range(4)]
ALL = (tuple(range(8)),)


def test_compute_and_memory():
    result = bounds(_costs(flops=900e12, kernels=18e12, hbm=820e9), parse_topology("v6e:2x4"), SQUARE)
    assert result.compute == pytest.approx(1.0)
    assert result.hbm == pytest.approx(0.5)
    assert (result.step, result.binding) == (result.compute, "compute")


def test_collectives_take_the_links_of_a_corner():
    """On 2x4 without rings a corner has two links of 100 GB/s, along one axis one."""
    topology = parse_topology("v6e:2x4")
    gather = _collective("all-gather", 8_000_000_000, ALL, times=3)
    assert bounds(_costs(gather), topology, SQUARE).interconnect == pytest.approx(3 * 7e9 / 200e9)
    along = _collective("reduce-scatter", 4_000_000_000, ((0, 1, 2, 3), (4, 5, 6, 7)))
    assert bounds(_costs(along), topology, SQUARE).interconnect == pytest.approx(3e9 / 100e9)
    both = _collective("all-reduce", 8_000_000_000, ALL)
    assert bounds(_costs(both), topology, SQUARE).interconnect == pytest.approx(14e9 / 200e9)
    alone = _collective("all-reduce", 8_000_000_000, tuple((i,) for i in range(8)))
    assert bounds(_costs(alone), topology, SQUARE).interconnect == 0


def test_a_ring_of_permutes_spans_its_chain():
    pairs = tuple((i, (i + 1) % 8) for i in range(8))
    permute = _collective("collective-permute", 1_000_000_000, pairs)
    assert bounds(_costs(permute), parse_topology("v6e:2x4"), SQUARE).interconnect == pytest.approx(1e9 / 200e9)


def test_between_slices_is_the_network():
    devices = [Chip(chip.coords, part) for part in range(2) for chip in SQUARE]
    crossing = _collective("all-reduce", 1_000_000_000, tuple((i, i + 8) for i in range(8)))
    inside = _collective("all-gather", 8_000_000_000, (tuple(range(8)), tuple(range(8, 16))))
    result = bounds(_costs(crossing, inside), parse_topology("v6e:2x4*2"), devices)
    assert result.network == pytest.approx(1e9 / 12.5e9)
    assert result.interconnect == pytest.approx(7e9 / 200e9)
    assert result.binding == "network"
    # As TPU compilers write it: two slices, each device with its like.
    sent = dataclasses.replace(_collective("all-reduce", 1_000_000_000, ((0, 1),)), slices=2)
    assert bounds(_costs(sent), parse_topology("v6e:2x4*2"), devices).network == pytest.approx(1e9 / 12.5e9)
    assert by_kind(_costs(sent), devices) == ({}, {"all-reduce": 1e9})


def test_bytes_by_kind():
    costs = _costs(_collective("all-gather", 800, ALL, 2), _collective("all-gather", 80, ALL))
    assert by_kind(costs, SQUARE) == ({"all-gather": 2 * 700 + 70}, {})
    devices = [Chip(chip.coords, part) for part in range(2) for chip in SQUARE]
    crossing = _collective("all-reduce", 800, tuple((i, i + 8) for i in range(8)), 3)
    assert by_kind(_costs(crossing), devices) == ({}, {"all-reduce": 3 * 800})


def test_a_product_of_several_passes():
    costs = _costs(flops=900e12, kernels=18e12, hbm=820e9)
    assert bounds(costs, parse_topology("v6e:2x4"), SQUARE, passes=6).compute == pytest.approx(6.0)


def test_the_two_devices_of_a_chip_share_its_links():
    """TPU7x: what both want comes once, over a link's 100 GB/s; what they give each other takes no link."""
    topology = parse_topology("tpu7x:2x2x1")
    devices = [Chip((x, y, 0)) for x in range(2) for y in range(2) for _ in range(2)]
    seconds = lambda kind, groups: bounds(_costs(_collective(kind, 8_000_000_000, groups)), topology, devices)
    on_chip = tuple((2 * i, 2 * i + 1) for i in range(4))
    assert seconds("all-reduce", on_chip).interconnect == 0
    assert seconds("collective-permute", on_chip).interconnect == 0
    assert seconds("all-gather", ALL).interconnect == pytest.approx(6e9 / 200e9)  # from three chips, over two links
    assert seconds("all-reduce", ALL).interconnect == pytest.approx(12e9 / 200e9)
    # Each device has its own share of what goes to all.
    assert seconds("all-to-all", ALL).interconnect == pytest.approx(2 * 6e9 / 200e9)
    # One device of every chip: half of its links.
    halves = ((0, 2, 4, 6), (1, 3, 5, 7))
    assert seconds("all-gather", halves).interconnect == pytest.approx(6e9 / 100e9)
