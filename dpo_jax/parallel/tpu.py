"""TPU generations: what a chip can do, how slices are named and shaped, and how programs are compiled for them.

Training and the compile-only plan read the same table, so that what is planned is what runs. Nothing here needs a TPU,
nor JAX until devices are asked for.

Sources: Cloud TPU documentation (v5e, v5p, v6e, TPU7x system architecture: peaks, HBM, "inter-chip interconnect
bandwidth" per chip over its ports, network cards per host); the memory that programs may use is what the compiler's own
out-of-memory error names; the names of compiler options are MaxText's (`xla_flags_library`).
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.disk import read_json
from dpo_jax.errors import UserError

# Weights are gathered, and gradients scattered, whole and beside products that do not need them. Compiled for an 8B
# model on v6e:2x4 (64 pairs): windowed products, XLA's default, move 1.5 times as much over HBM (partial sums) and 1.2
# times as much over the interconnect. MaxText's set for v6e, with scoped VMEM of 96 MiB and collectives over multiple
# steps, took seven times as long to compile for 1.4 times the bytes over HBM of the default.
OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of chips (`tpu.json`); numbers are per JAX device (TPU7x: half a chip).

    Attributes:
      name: as topologies name it.
      kinds: `device_kind` of its devices.
      cloud: prefixes of Cloud's accelerator types, such as `v5litepod` in `v5litepod-16`.
      counted: what the number in an accelerator type counts per chip: 1 chips, 2 cores.
      devices: JAX devices per chip.
      peak_flops: bfloat16 operations per second.
      hbm_gib: GiB that a program may use.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second over one link to a neighbour, one way.
      torus: an axis of a slice is closed to a ring if its length divides by this; of a slice of three axes all or none
        ("slices smaller than a full cube don't have wrap-around links").
      dcn_bandwidth: bytes per second to other slices, one way.
      host_bandwidth: bytes per second between HBM and the host's memory, one way.
      largest_tile: of attention's kernel, see `tpu_splash.Tiling`.
      shapes: slices that are offered.
      compiler_options: XLA's, for every step.
    """

    name: str
    kinds: Sequence[str]
    cloud: Sequence[str]
    counted: int
    devices: int
    peak_flops: float
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus: int
    dcn_bandwidth: float
    host_bandwidth: float
    largest_tile: int
    shapes: Sequence[str]
    compiler_options: Mapping[str, str]

    @property
    def hbm_bytes(self) -> float:
        return self.hbm_gib * GIB


GIB = 2.0**30
# Read when the compiler is loaded: no TPU is looked for, and other programs on this machine may do the same.
COMPILING_ONLY = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
GENERATIONS = {
    name: Generation(name, **facts, compiler_options=OPTIONS)
    for name, facts in read_json(Path(__file__).with_suffix(".json")).items()
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some slices of one generation.

    Attributes:
      generation: of its chips.
      shape: chips along each axis of a slice.
      slices: how many.
    """

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse_topology` reads it."""
        return f"{self.generation.name}:{self.slice_shape}" + (f"*{self.slices}" if self.slices > 1 else "")

    @property
    def slice_shape(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def accelerator_type(self) -> str:
        """Cloud's name of one of its slices, such as v5p-16 for 8 chips."""
        return f"{self.generation.cloud[0]}-{math.prod(self.shape) * self.generation.counted}"

    def links(self, lengths: tuple[int, ...]) -> int:
        """Over how many links the worst placed chip receives, in a group that spans `lengths` chips along each axis."""
        rings = [axis % self.generation.torus == 0 for axis in self.shape]
        if len(self.shape) == 3:  # cubes are joined to each other and to themselves, what is smaller is not
            rings = [all(rings)] * 3
        axes = zip(lengths, self.shape, rings, strict=True)
        return sum(0 if length == 1 else 2 if ring and length == axis else 1 for length, axis, ring in axes)

    def devices(self) -> list[Any]:
        """Its devices, for compiling only.

        Raises:
          UserError: the TPU compiler is not installed.
        """
        from jax.experimental import topologies

        os.environ |= COMPILING_ONLY
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if math.prod(self.shape) < 4:
            options["chips_per_host_bounds"] = (*self.shape, 1, 1)[:3]
        try:
            with quiet():
                described = topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{self.generation.name}:{self.slice_shape}", **options
                )
        except Exception as e:  # plugin errors are of many kinds
            if importlib.util.find_spec("libtpu") is None:
                raise UserError(
                    f"{self.name}: the TPU compiler is not installed; pip install 'dpo_jax[tpu]' (Linux, x86-64)"
                ) from None
            first = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise UserError(f"{self.name}: the TPU compiler refuses this topology ({first})") from None
        return list(described.devices)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the TPU runtime prints on a machine without a TPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def parse_topology(text: str) -> Topology:
    """Read `v6e:2x4`, two slices `v6e:2x4*2`, or Cloud's accelerator type: `v6e-8`, `v5litepod-16`, `v5p-16` (cores).

    Raises:
      UserError: there is none of this name; lists those that there are.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::([0-9x]+)|-(\d+))(?:\*(\d+))?", text.strip())
    by_prefix = {prefix: g for g in GENERATIONS.values() for prefix in (g.name, *g.cloud)}
    generation = by_prefix.get(match[1]) if match else None
    if match is None or generation is None:
        known = "; ".join(f"{g.name}:{{{','.join(g.shapes)}}}" for g in GENERATIONS.values())
        raise UserError(f"topology {text!r} does not exist; there are {known}; several slices as v6e:2x4*2")
    slices = int(match[4] or 1)
    there = [Topology(generation, tuple(map(int, shape.split("x"))), slices) for shape in generation.shapes]
    asked = match[2] or f"{generation.cloud[0]}-{int(match[3])}"
    topology = next((t for t in there if asked in (t.slice_shape, t.accelerator_type)), None)
    if topology is None or slices < 1:
        raise UserError(
            f"topology {text!r} does not exist; of {generation.name} there are {', '.join(generation.shapes)} "
            f"(chips), also as {', '.join(t.accelerator_type for t in there)}"
        )
    return topology


def generation_of(device: Any) -> Generation | None:
    """The generation of a JAX device; None if it is no TPU, or one that is not in the table."""
    if device.platform != "tpu":
        return None
    return next((g for g in GENERATIONS.values() if device.device_kind in g.kinds), None)
