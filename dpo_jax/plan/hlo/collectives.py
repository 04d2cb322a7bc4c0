"""Collectives in HLO: what is exchanged, between which devices, and how much of it each one receives."""

import dataclasses
import math
import re

import numpy as np

from dpo_jax.plan.hlo.text import Computation, Instruction, Module, arrays, numbers

COLLECTIVES = frozenset(
    "all-gather reduce-scatter all-reduce all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)
# Collectives between slices are left to the runtime: a `send` to the host names one, its `recv` brings the result.
BETWEEN_SLICES = "_xla_megascale_transfer_type"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: a name in `COLLECTIVES`.
      op_name: where in the program it was traced.
      payload_bytes: of the whole array: what all-gather gives out, what the others take in.
      groups: the devices that exchange with each other; of a permute its (source, target) pairs.
      times: how often it runs.
      asynchronous: whether other work may run meanwhile.
      slices: how many slices exchange; if several, `groups` has one, of as many: each device meets its like there.
    """

    kind: str
    op_name: str
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


def read_collective(module: Module, inside: Computation, it: Instruction, times: float, fused: bool) -> Collective:
    """A collective of one slice; `fused`: inside a fusion."""
    kind = it.opcode.removesuffix("-start")
    if kind == "all-reduce" and fused and _only_sliced(inside, it.name):
        kind = "reduce-scatter"  # as TPU writes it: a fusion of the two, in which no device receives the whole
    groups = _groups(module, it)
    return _collective(kind, inside, it, times, groups, asynchronous=it.opcode.endswith("-start"))


def read_between_slices(inside: Computation, it: Instruction, times: float) -> Collective:
    """A collective between slices, by its `send`."""
    kind = it.quoted(BETWEEN_SLICES).lower().replace("_", "-")
    target = re.fullmatch(r"\{([\d,:]+)\}x\{[\d,:]+\}", it.quoted("_xla_megascale_target"))
    if kind not in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all") or target is None:
        raise it.error("a transfer between slices that is not known")
    ranges = (part.partition(":") for part in target[1].split(","))  # 1,2,3 or 1:3
    slices = sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
    return _collective(kind, inside, it, times, (tuple(range(slices)),), asynchronous=True, slices=slices)


def _collective(
    kind: str,
    inside: Computation,
    it: Instruction,
    times: float,
    groups: tuple[tuple[int, ...], ...],
    *,
    asynchronous: bool,
    slices: int = 1,
) -> Collective:
    data = [array for shape in inside.operand_shapes(it) for array in arrays(shape)]
    if kind == "ragged-all-to-all" or slices > 1:  # the others are the result's place, offsets and sizes, or a token
        data = data[:1]
    payload = sum(array.bytes for array in data) * (len(groups[0]) if kind == "all-gather" else 1)
    return Collective(kind, it.quoted("op_name"), payload, groups, times, asynchronous, slices)


def _only_sliced(inside: Computation, name: str) -> bool:
    users = [user for user, _ in inside.users.get(name, ())]
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode == "bitcast" and _only_sliced(inside, user.name))
        for user in users
    )


def _groups(module: Module, it: Instruction) -> tuple[tuple[int, ...], ...]:
    """Which devices exchange with each other, from any of the ways in which HLO writes it."""
    listed = it.braced("source_target_pairs") or it.braced("replica_groups")
    if listed:
        return tuple(tuple(numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed))
    iota = it.find(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
    order = r"(?:,?\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    mesh = it.find(rf"replica_groups=mesh\[([^\]]*)\]{order}\s*\{{([^}}]*)\}}")
    if iota:
        ids = _in_order(numbers(iota[2]), iota[3]).reshape(numbers(iota[1]))
    elif mesh:
        axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        over = re.findall(r"'([^']*)'", mesh[4])
        sizes = list(axes.values())
        devices = _in_order(numbers(mesh[2]) or [math.prod(sizes)], mesh[3]).reshape(sizes)
        last = [list(axes).index(name) for name in over]
        ids = np.moveaxis(devices, last, range(-len(last), 0)).reshape(-1, math.prod(axes[name] for name in over))
    elif "replica_groups=" in it.attributes and listed is None:
        raise it.error("replica_groups in a form that is not known")
    else:
        ids = np.arange(module.devices)[None]
    return tuple(tuple(int(n) for n in group) for group in ids)


def _in_order(dims: list[int], transposed: str | None) -> np.ndarray:
    """Device numbers 0, 1, ... as an array of `dims`, its axes in another order if one is given."""
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(numbers(transposed)) if transposed else ids
