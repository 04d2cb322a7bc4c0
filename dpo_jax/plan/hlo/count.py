"""What a compiled program does, counted in its HLO: FLOPs, bytes over HBM, bytes over the interconnect by collective.

XLA's own `cost_analysis()` counts a loop's body once and a Pallas kernel not at all. Here a body counts as often as its
loop runs, and kernels are counted by the caller's formula. All numbers are those of one device.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from dpo_jax.plan.hlo.bytes import CALLS_WITHOUT_PRODUCTS, COLLECTIVES, goes_on, moved_bytes, starts
from dpo_jax.plan.hlo.flops import FLOPS
from dpo_jax.plan.hlo.loops import trip_count
from dpo_jax.plan.hlo.text import HBM, HOST, Computation, Instruction, Module, Shape, leaves, parse


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A custom call, such as a Pallas kernel (target `tpu_custom_call`), whose cost HLO does not tell.

    Attributes:
      name: the kernel's: of a `pallas_call` the name that it was given, else the last part of `op_name`.
      target: what it calls.
      operands, results: arrays as they lie on one device.
      op_name: where in the program it was traced.
      cost_estimate: FLOPs that the kernel's author states, if any.
    """

    name: str
    target: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    op_name: str
    cost_estimate: float | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: a name in `COLLECTIVES`.
      name, op_name: the instruction's, and where in the program it was traced.
      dtype: of its first operand.
      payload_bytes: of the whole array: what all-gather gives out, what the others take in.
      groups: the devices that exchange with each other; of a permute its (source, target) pairs.
      times: how often it runs.
      asynchronous: whether other work may go on meanwhile.
      slices: how many slices exchange; if several, `groups` has one, of as many: each device meets its like there.
    """

    kind: str
    name: str
    op_name: str
    dtype: str
    payload_bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: float
    asynchronous: bool
    slices: int = 1

    @property
    def group_size(self) -> int:
        return len(self.groups[0])

    @property
    def received_bytes(self) -> float:
        """What one device must receive each time, at least.

        All-gather, reduce-scatter and all-to-all (n-1)/n of the payload, all-reduce twice that, the others all of it.
        """
        if self.kind.startswith("collective-"):
            return float(self.payload_bytes)
        share = (self.group_size - 1) / self.group_size
        return self.payload_bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one device does in a run of the program.

    Attributes:
      flops: of matrix products and convolutions, 2 a multiply-add.
      kernel_flops: of custom calls, by the caller's formula.
      hbm_bytes: read and written by instructions, padding of tiles included. A kernel's operands count once, though it
        may read them more often; what stays on the chip between instructions does not count.
      chip_bytes: read and written likewise in memories on the chip (VMEM, SMEM).
      from_host_bytes, to_host_bytes: read from, and written to, the host's memory.
      collectives: each instruction once, with how often it runs.
      kernels: custom calls by name and how often they run.
      unknown_kernels: names of those that the caller's formula does not know; their FLOPs are missing.
      unknown_loops: names of loops whose trip count is not known; their bodies are counted once.
    """

    flops: float
    kernel_flops: float
    hbm_bytes: float
    chip_bytes: float
    from_host_bytes: float
    to_host_bytes: float
    collectives: tuple[Collective, ...]
    kernels: dict[str, float]
    unknown_kernels: tuple[str, ...]
    unknown_loops: tuple[str, ...]


KernelFlops = Callable[[KernelCall], float | None]


def estimated_flops(call: KernelCall) -> float | None:
    """What the kernel's author states."""
    return call.cost_estimate


def count(text: str, kernel_flops: KernelFlops = estimated_flops, *, once: bool = False) -> Costs:
    """Count what a compiled program does on one device.

    Args:
      text: `compiled.as_text()`: optimized, partitioned HLO.
      kernel_flops: FLOPs of one run of a custom call on one device; None if it is not known.
      once: count the bodies of loops once, as `cost_analysis()` does.

    Raises:
      HloError: the text has something that is not understood; the line is named.
    """
    module = parse(text)
    entry = module.computations[module.entry]
    return _Counter(module, kernel_flops, once).computation(entry, 1.0, fused=False).costs()


@dataclasses.dataclass
class _Sum:
    """Costs while they are added up."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: Counter[int] = dataclasses.field(default_factory=Counter)  # by memory space
    to_host: float = 0.0  # of those in the host's
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_kernels: dict[str, None] = dataclasses.field(default_factory=dict)
    unknown_loops: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Sum") -> None:
        self.flops += other.flops
        self.kernel_flops += other.kernel_flops
        self.bytes.update(other.bytes)
        self.to_host += other.to_host
        self.collectives += other.collectives
        self.kernels.update(other.kernels)
        self.unknown_kernels |= other.unknown_kernels
        self.unknown_loops |= other.unknown_loops

    def costs(self) -> Costs:
        return Costs(
            flops=self.flops,
            kernel_flops=self.kernel_flops,
            hbm_bytes=float(self.bytes[HBM]),
            chip_bytes=float(sum(size for space, size in self.bytes.items() if space not in (HBM, HOST))),
            from_host_bytes=float(self.bytes[HOST] - self.to_host),
            to_host_bytes=self.to_host,
            collectives=tuple(self.collectives),
            kernels=dict(self.kernels),
            unknown_kernels=tuple(self.unknown_kernels),
            unknown_loops=tuple(self.unknown_loops),
        )


@dataclasses.dataclass(frozen=True)
class _Counter:
    """Walks the computations of a module; `once` as in `count`."""

    module: Module
    kernel_flops: KernelFlops
    once: bool

    def computation(self, computation: Computation, times: float, *, fused: bool) -> _Sum:
        """What `times` runs of a computation cost; inside a fusion, nothing lies in HBM."""
        total = _Sum()
        for instruction in computation.instructions.values():
            self.instruction(total, computation, instruction, times, fused)
        return total

    def instruction(self, total: _Sum, inside: Computation, it: Instruction, times: float, fused: bool) -> None:
        kind = it.opcode.removesuffix("-start")
        if it.opcode == "while":
            self.loop(total, inside, it, times)
        elif it.opcode == "conditional":
            total.add(self.dearest(it, times))
        elif it.opcode in ("call", "async-start"):
            callee = it.called("to_apply") or it.called("calls") or it.called("called_computation")
            inner = self.computation(self.module.of(callee, it), times, fused=fused)
            if it.opcode == "async-start":
                inner.collectives = [dataclasses.replace(c, asynchronous=True) for c in inner.collectives]
            total.add(inner)
        else:
            if it.opcode == "fusion":
                fusion = self.module.of(it.called("calls"), it)
                inner = self.computation(fusion, times, fused=True)
                op_name = it.quoted("op_name") or ""
                if goes_on(fusion):  # counted where it was started
                    inner.collectives = []
                inner.collectives = [
                    dataclasses.replace(c, op_name=c.op_name or op_name, asynchronous=c.asynchronous or starts(fusion))
                    for c in inner.collectives
                ]
                total.add(inner)
            elif it.opcode in ("dot", "convolution", "ragged-dot"):
                total.flops += times * FLOPS[it.opcode](inside, it)
            elif it.opcode == "custom-call":
                self.custom_call(total, inside, it, times)
            elif kind in COLLECTIVES:
                total.collectives.append(_collective(self.module, inside, it, times, fused))
            elif it.opcode == "send" and it.quoted(BETWEEN_SLICES):
                total.collectives.append(_between_slices(inside, it, times))
            if not fused:
                read, written = moved_bytes(self.module, inside, it)
                for space, size in (read + written).items():
                    total.bytes[space] += times * size  # type: ignore[assignment]
                total.to_host += times * written[HOST]

    def loop(self, total: _Sum, inside: Computation, it: Instruction, times: float) -> None:
        trips = trip_count(self.module, inside, it)
        if trips is None:
            total.unknown_loops[it.name] = None
        body = self.module.of(it.called("body"), it)
        total.add(self.computation(body, times * (1 if self.once or trips is None else trips), fused=False))

    def dearest(self, it: Instruction, times: float) -> _Sum:
        """The branch that costs most."""
        names = (it.braced("branch_computations") or "").replace("%", "").replace(" ", "").split(",")
        if names == [""]:
            names = [it.called(f"{which}_computation") or "" for which in ("true", "false")]
        sums = [self.computation(self.module.of(name, it), times, fused=False) for name in names]
        return max(sums, key=lambda s: (s.flops + s.kernel_flops, s.bytes[HBM]))

    def custom_call(self, total: _Sum, inside: Computation, it: Instruction, times: float) -> None:
        call = _kernel_call(inside, it)
        if call.target in CALLS_WITHOUT_PRODUCTS:
            return
        total.kernels[call.name] += times  # type: ignore[assignment]
        flops = self.kernel_flops(call)
        if flops is None:
            total.unknown_kernels[call.name] = None
        else:
            total.kernel_flops += times * flops


def _kernel_call(inside: Computation, it: Instruction) -> KernelCall:
    op_name = it.quoted("op_name") or ""
    name = op_name.removesuffix("/pallas_call").rpartition("/")[2] or re.sub(r"\.\d+$", "", it.name)
    estimate = re.search(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)', it.text)
    return KernelCall(
        name=name,
        target=it.quoted("custom_call_target") or "",
        operands=tuple(leaves(tuple(inside.operand_shapes(it)))),
        results=tuple(leaves(it.shape)),
        op_name=op_name,
        cost_estimate=float(estimate[1]) if estimate else None,
    )


def _collective(module: Module, inside: Computation, it: Instruction, times: float, fused: bool) -> Collective:
    kind = it.opcode.removesuffix("-start")
    if kind == "all-reduce" and fused and _only_sliced(inside, it.name):
        kind = "reduce-scatter"  # as TPU writes it: a fusion of the two, in which nobody receives the whole
    operands = [leaf for shape in inside.operand_shapes(it) for leaf in leaves(shape)]
    if kind == "ragged-all-to-all":  # the others are where the result goes, offsets and sizes
        operands = operands[:1]
    groups = _groups(module, it)
    payload = sum(leaf.bytes for leaf in operands)
    return Collective(
        kind=kind,
        name=it.name,
        op_name=it.quoted("op_name") or "",
        dtype=operands[0].dtype if operands else "",
        payload_bytes=payload * len(groups[0]) if kind == "all-gather" else payload,
        groups=groups,
        times=times,
        asynchronous=it.opcode.endswith("-start"),
    )


# Collectives between slices are left to the runtime: a `send` to the host says which, its `recv` brings the result.
BETWEEN_SLICES = "_xla_megascale_transfer_type"


def _between_slices(inside: Computation, it: Instruction, times: float) -> Collective:
    kind = (it.quoted(BETWEEN_SLICES) or "").lower().replace("_", "-")
    target = re.fullmatch(r"\{([\d,:]+)\}x\{[\d,:]+\}", it.quoted("_xla_megascale_target") or "")
    if kind not in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all") or target is None:
        raise it.error("a transfer between slices that is not known")
    slices = 0
    for part in target[1].split(","):  # 1,2,3 or 1:3
        first, _, last = part.partition(":")
        slices += int(last or first) - int(first) + 1
    (data, *_) = (leaf for shape in inside.operand_shapes(it) for leaf in leaves(shape))
    return Collective(
        kind=kind,
        name=it.name,
        op_name=it.quoted("op_name") or "",
        dtype=data.dtype,
        payload_bytes=data.bytes * slices if kind == "all-gather" else data.bytes,
        groups=(tuple(range(slices)),),
        times=times,
        asynchronous=True,
        slices=slices,
    )


def _only_sliced(inside: Computation, name: str) -> bool:
    users = [user for user, _ in inside.users.get(name, ())]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode == "bitcast" and _only_sliced(inside, user.name))
        for user in users
    )


def _groups(module: Module, it: Instruction) -> tuple[tuple[int, ...], ...]:
    """Which devices exchange with each other, from any of the ways in which HLO writes it."""
    everyone = (tuple(range(module.devices)),)
    pairs = it.braced("source_target_pairs")
    if pairs is not None:
        return _listed(pairs) or everyone
    listed = it.braced("replica_groups")
    if listed is not None:
        return _listed(listed) or everyone
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", it.attributes)
    order = r"(?:,?\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\]{order}\s*\{{([^}}]*)\}}", it.attributes)
    if iota:
        shape = [int(n) for n in iota[1].split(",")]
        ids = _in_order(iota[2], iota[3]).reshape(shape)
    elif mesh:
        axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        over = re.findall(r"'([^']*)'", mesh[4])
        devices = _in_order(mesh[2] or str(math.prod(axes.values())), mesh[3]).reshape(list(axes.values()))
        kept = [i for i, name in enumerate(axes) if name not in over]
        moved = [list(axes).index(name) for name in over]
        ids = devices.transpose(kept + moved).reshape(-1, math.prod(axes[name] for name in over))
    elif "replica_groups=" in it.attributes:
        raise it.error("replica_groups in a form that is not known")
    else:
        return everyone
    return tuple(tuple(int(n) for n in group) for group in ids)


def _in_order(dims: str, transposed: str | None) -> np.ndarray:
    """Device numbers 0, 1, ... as an array of `dims`, its axes in another order if one is given."""
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in transposed.split(",")]) if transposed else ids


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))
