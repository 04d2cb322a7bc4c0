"""What a slice's chips could do at best with a compiled program: the three time bounds, and which one binds."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dpo_jax.hlo import Collective, Costs
from dpo_jax.tpu import Topology


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds of one run of a program if only one thing took time, all else hidden behind it.

    Attributes:
      compute: FLOPs over the peak.
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


def bounds(costs: Costs, topology: Topology, devices: Sequence[Any]) -> Bounds:
    """The bounds of a program on a topology; `devices` in the order of the mesh that it was compiled for."""
    chip = topology.generation
    inside = network = 0.0
    for it in costs.collectives:
        if it.received_bytes == 0:
            continue
        if _slices(it, devices) > 1:
            network += it.times * it.received_bytes / chip.dcn_bandwidth
        else:
            inside += it.times * it.received_bytes / (_links(it, topology, devices) * chip.link_bandwidth)
    return Bounds(
        compute=(costs.flops + costs.kernel_flops) / chip.peak_flops,
        hbm=costs.hbm_bytes / chip.hbm_bandwidth,
        interconnect=inside,
        network=network,
        host=max(costs.from_host_bytes, costs.to_host_bytes) / chip.host_bandwidth,
    )


def by_kind(costs: Costs) -> dict[str, float]:
    """Bytes that one device receives in a run of the program, by kind of collective."""
    totals: dict[str, float] = {}
    for it in costs.collectives:
        totals[it.kind] = totals.get(it.kind, 0.0) + it.times * it.received_bytes
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


def _slices(it: Collective, devices: Sequence[Any]) -> int:
    return max(len({getattr(devices[i], "slice_index", None) or 0 for i in group}) for group in _members(it))


def _links(it: Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """Links of the worst placed chip in the group that has fewest; the two devices of one chip have one's worth."""
    fewest = math.inf
    for group in _members(it):
        at = [devices[i].coords[: len(topology.shape)] for i in group]
        lengths = tuple(len(set(axis)) for axis in zip(*at, strict=True))
        if len(group) > 1:
            fewest = min(fewest, max(1, topology.links(lengths)))
    return fewest
