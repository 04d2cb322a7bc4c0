"""What a slice's chips could do at best with a compiled program: its time bounds, and which of them is the largest."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from dpo_jax.parallel.tpu import Topology
from dpo_jax.plan.hlo.collectives import Collective
from dpo_jax.plan.hlo.count import Costs
from dpo_jax.plan.hlo.text import HOST


def where_it_runs(topology: Topology, mesh: Mesh) -> dict[str, Any]:
    """What every report says of the slice and the mesh on it."""
    return {
        "topology": topology.name,
        "accelerator_type": topology.accelerator_type,
        "chips": topology.chips,
        "devices_per_chip": topology.generation.devices,
        "mesh": dict(mesh.shape),
    }


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds of one run of a program if only one thing took time, all else hidden behind it.

    Attributes:
      compute: FLOPs over the peak, as often as a product passes through the matrix unit.
      hbm: bytes over the memory's bandwidth.
      interconnect: collectives inside a slice, one after the other, over the links that the worst placed chip has.
      network: collectives between slices.
      host: bytes from the host's memory, or those to it where they are more, as links carry both ways at once.
    """

    compute: float
    hbm: float
    interconnect: float
    network: float
    host: float

    @property
    def step(self) -> float:
        """No run is faster than this."""
        return max(dataclasses.astuple(self))

    @property
    def binding(self) -> str:
        """The name of the largest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def bounds(costs: Costs, topology: Topology, devices: Sequence[Any], *, passes: int = 1) -> Bounds:
    """The bounds of a program on a topology.

    Args:
      costs: what one device does.
      topology: where.
      devices: in the order of the mesh that the program was compiled for.
      passes: products of bfloat16 numbers that make one product, see `tuning.passes`.
    """
    chip = topology.generation
    inside = network = 0.0
    for it in costs.collectives:
        if _between_slices(it, devices):
            network += it.times * it.received_bytes / chip.dcn_bandwidth
        else:
            inside += _seconds(it, topology, devices)
    return Bounds(
        compute=passes * (costs.flops + costs.kernel_flops) / chip.peak_flops,
        hbm=costs.hbm_bytes / chip.hbm_bandwidth,
        interconnect=inside,
        network=network,
        host=max(costs.read[HOST], costs.written[HOST]) / chip.host_bandwidth,
    )


def by_kind(costs: Costs, devices: Sequence[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that one device receives in a run of the program, by kind of collective: in its slice; between slices."""
    totals: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for it in costs.collectives:
        of = totals[_between_slices(it, devices)]
        of[it.kind] = of.get(it.kind, 0.0) + it.times * it.received_bytes
    return totals


def _members(it: Collective) -> list[set[int]]:
    """Groups of devices that exchange with each other; the pairs of a permute are chains of one or more groups."""
    if not it.kind.startswith("collective-"):
        return [set(group) for group in it.groups]
    chains: list[set[int]] = []
    for pair in it.groups:
        touched = [chain for chain in chains if chain & set(pair)]
        chains = [chain for chain in chains if chain not in touched] + [set(pair).union(*touched)]
    return chains


def _between_slices(it: Collective, devices: Sequence[Any]) -> bool:
    slices = ({getattr(devices[i], "slice_index", None) or 0 for i in group} for group in _members(it))
    return it.slices > 1 or any(len(group) > 1 for group in slices)


def _seconds(it: Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """Time of a collective inside a slice: of the group that takes longest, over the links of its worst placed chip.

    The devices of a chip hand each other what one of them has: what both want comes to the chip once (and an all-reduce
    is summed on the chip before it leaves), over the links of both.
    """
    longest = 0.0
    for group in _members(it):
        at = [tuple(devices[i].coords) for i in group]
        chips = len(set(at))
        if chips == 1:
            continue
        if it.kind.startswith("collective-"):
            received = float(it.payload_bytes)
        else:
            received = it.payload_bytes * ((chips - 1) / chips) * (2 if it.kind == "all-reduce" else 1)
            received /= len(group) / chips if it.kind != "all-to-all" else 1
        axes = zip(*(coords[: len(topology.shape)] for coords in at), strict=True)
        links = max(1, topology.links(tuple(len(set(axis)) for axis in axes)))
        longest = max(longest, it.times * received / (links * topology.generation.link_bandwidth))
    return longest
