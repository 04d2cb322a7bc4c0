"""What a compiled program does, counted in its HLO: FLOPs, bytes over HBM, bytes over the interconnect by collective.

XLA's own `cost_analysis()` counts a loop's body once and a Pallas kernel not at all. Here a body counts as often as its
loop runs, and kernels are counted by the caller's formula. All numbers are those of one device.
"""

import dataclasses
import operator
import re
from collections import Counter
from collections.abc import Callable

from dpo_jax.plan.hlo.bytes import CALLS_WITHOUT_PRODUCTS, continues_collective, moved_bytes, starts_collective
from dpo_jax.plan.hlo.collectives import BETWEEN_SLICES, COLLECTIVES, Collective, read_between_slices, read_collective
from dpo_jax.plan.hlo.flops import FLOPS
from dpo_jax.plan.hlo.loops import trip_count
from dpo_jax.plan.hlo.text import HBM, Computation, Instruction, Module, Shape, arrays, parse_hlo


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A custom call, such as a Pallas kernel (target `tpu_custom_call`), whose cost HLO does not tell.

    Attributes:
      name: the kernel's: of a `pallas_call` the name that it was given, else the last part of `op_name`.
      target: what it calls.
      operands, results: arrays as they are on one device.
      cost_estimate: FLOPs that the kernel's author states, if any.
    """

    name: str
    target: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    cost_estimate: float | None


@dataclasses.dataclass
class Costs:
    """What one device does in a run of the program.

    Attributes:
      flops: of matrix products and convolutions, 2 a multiply-add.
      kernel_flops: of custom calls, by the caller's formula.
      read, written: bytes by memory space, padding of tiles included. A kernel's operands count once, though it may
        read them more often; what stays on the chip between instructions counts as memory on the chip.
      collectives: each instruction once, with how often it runs.
      kernels: custom calls by name and how often they run.
      unknown_kernels: names of those that the caller's formula does not know; their FLOPs are missing.
      unknown_loops: names of loops whose trip count is not known; their bodies are counted once.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    read: Counter[int] = dataclasses.field(default_factory=Counter)
    written: Counter[int] = dataclasses.field(default_factory=Counter)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_kernels: tuple[str, ...] = ()
    unknown_loops: tuple[str, ...] = ()

    @property
    def hbm_bytes(self) -> float:
        """Read and written in HBM."""
        return float(self.read[HBM] + self.written[HBM])

    def add(self, other: "Costs") -> None:
        self.flops += other.flops
        self.kernel_flops += other.kernel_flops
        self.read.update(other.read)
        self.written.update(other.written)
        self.collectives += other.collectives
        self.kernels.update(other.kernels)
        self.unknown_kernels = tuple(dict.fromkeys(self.unknown_kernels + other.unknown_kernels))
        self.unknown_loops = tuple(dict.fromkeys(self.unknown_loops + other.unknown_loops))


KernelFlops = Callable[[KernelCall], float | None]


def count_costs(
    text: str, kernel_flops: KernelFlops = operator.attrgetter("cost_estimate"), *, once: bool = False
) -> Costs:
    """Count what a compiled program does on one device.

    Args:
      text: `compiled.as_text()`: optimized, partitioned HLO.
      kernel_flops: FLOPs of one run of a custom call on one device, None if they are not known; left out: what the
        kernel's author states.
      once: count the bodies of loops once, as `cost_analysis()` does.

    Raises:
      HloError: the text has something that is not understood; the line is named.
    """
    module = parse_hlo(text)
    return _Counter(module, kernel_flops, once).computation(module.computations[module.entry], 1.0)


def count_turn(text: str, kernel_flops: KernelFlops = operator.attrgetter("cost_estimate")) -> tuple[Costs, Costs]:
    """The costs of one turn of a program's outermost loop whose trips are not known, and of all that is outside it.

    Of several such loops a turn is one of each. Arguments and errors are those of `count_costs`.
    """
    module, turns = parse_hlo(text), Costs()
    outside = _Counter(module, kernel_flops, once=False, turns=turns)
    return turns, outside.computation(module.computations[module.entry], 1.0)


@dataclasses.dataclass(frozen=True)
class _Counter:
    """Walks the computations of a module; `once` as in `count_costs`.

    With `turns`, bodies of loops that run nobody knows how often are added to it, and counted nowhere else.
    """

    module: Module
    kernel_flops: KernelFlops
    once: bool
    turns: Costs | None = None

    def computation(self, computation: Computation, times: float, *, fused: bool = False) -> Costs:
        """What `times` runs of a computation cost; values inside a fusion are in no memory."""
        total = Costs()
        for it in computation.instructions.values():
            total.add(self.instruction(computation, it, times, fused))
            if not fused and it.opcode not in ("while", "conditional", "call", "async-start"):
                read, written = moved_bytes(self.module, computation, it)
                total.add(Costs(read=_scaled(read, times), written=_scaled(written, times)))
        return total

    def instruction(self, inside: Computation, it: Instruction, times: float, fused: bool) -> Costs:
        """What an instruction computes and exchanges; of one that runs other computations, all that they cost."""
        if it.opcode == "while":
            return self.loop(inside, it, times)
        if it.opcode == "conditional":
            return self.dearest(it, times)
        if it.opcode in ("call", "async-start"):
            costs = self.computation(self.module.called(it), times, fused=fused)
            if it.opcode == "async-start":
                costs.collectives = [dataclasses.replace(c, asynchronous=True) for c in costs.collectives]
            return costs
        if it.opcode == "fusion":
            return self.fusion(it, times)
        if it.opcode in FLOPS:
            return Costs(flops=times * FLOPS[it.opcode](inside, it))
        if it.opcode == "custom-call":
            return self.kernel(inside, it, times)
        if it.opcode.removesuffix("-start") in COLLECTIVES:
            return Costs(collectives=[read_collective(self.module, inside, it, times, fused)])
        if it.opcode == "send" and it.quoted(BETWEEN_SLICES):
            return Costs(collectives=[read_between_slices(inside, it, times)])
        return Costs()

    def loop(self, inside: Computation, it: Instruction, times: float) -> Costs:
        trips = trip_count(self.module, inside, it)
        if trips is None and self.turns is not None:
            body = self.module.called(it, "body")
            self.turns.add(dataclasses.replace(self, turns=None).computation(body, 1.0))
            return Costs()
        total = Costs(unknown_loops=(it.name,) if trips is None else ())
        total.add(
            self.computation(self.module.called(it, "body"), times * (1 if self.once or trips is None else trips))
        )
        return total

    def dearest(self, it: Instruction, times: float) -> Costs:
        """The branch that costs most."""
        names = re.findall(r"[\w.-]+", it.braced("branch_computations") or "")
        branches = [self.module.named(name, it) for name in names]
        branches = branches or [self.module.called(it, f"{which}_computation") for which in ("true", "false")]
        costs = [self.computation(branch, times) for branch in branches]
        return max(costs, key=lambda c: (c.flops + c.kernel_flops, c.hbm_bytes))

    def fusion(self, it: Instruction, times: float) -> Costs:
        fused = self.module.called(it)
        costs = self.computation(fused, times, fused=True)
        if continues_collective(fused):  # counted where it was started
            costs.collectives = []
        op_name, starts = it.quoted("op_name"), starts_collective(fused)
        costs.collectives = [
            dataclasses.replace(c, op_name=c.op_name or op_name, asynchronous=c.asynchronous or starts)
            for c in costs.collectives
        ]
        return costs

    def kernel(self, inside: Computation, it: Instruction, times: float) -> Costs:
        call = _kernel_call(inside, it)
        if call.target in CALLS_WITHOUT_PRODUCTS:
            return Costs()
        flops = self.kernel_flops(call)
        runs: Counter[str] = Counter({call.name: times})
        if flops is None:
            return Costs(kernels=runs, unknown_kernels=(call.name,))
        return Costs(kernels=runs, kernel_flops=times * flops)


def _scaled(moved: Counter[int], times: float) -> Counter[int]:
    return Counter({space: times * size for space, size in moved.items()})


def _kernel_call(inside: Computation, it: Instruction) -> KernelCall:
    op_name = it.quoted("op_name")
    name = op_name.removesuffix("/pallas_call").rpartition("/")[2] or re.sub(r"\.\d+$", "", it.name)
    estimate = re.search(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)', it.text)
    return KernelCall(
        name=name,
        target=it.quoted("custom_call_target"),
        operands=tuple(arrays(tuple(inside.operand_shapes(it)))),
        results=tuple(arrays(it.shape)),
        cost_estimate=float(estimate[1]) if estimate else None,
    )
