"""Bytes that one HLO instruction moves to and from memory."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable

from dpo_jax.plan.hlo.collectives import COLLECTIVES
from dpo_jax.plan.hlo.text import Computation, Instruction, Module, Tree, arrays

# Nothing is read or written: names and views. So is the second half (`-done`) of what was counted at its start.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier add-dependency "
    "domain async-update".split()
)
# Custom calls that do nothing; and those that compute, but no products.
FREE_CALLS = frozenset(
    "AllocateBuffer AssumeGatherIndicesInBound ConcatBitcast MoveToDevice MoveToHost PadToStatic Sharding SliceId "
    "SliceToDynamic SPMDFullToShardShape SPMDShardToFullShape annotate_device_placement".split()
)
CALLS_WITHOUT_PRODUCTS = FREE_CALLS.union(
    "GatherScatterIndicesBitpacked TopK ZeroCrop AsyncCollectiveStart AsyncCollectiveDone".split()
)
# What takes a part of its first operand.
SLICES = ("dynamic-slice", "slice", "gather")
WHOLE = math.inf  # more bytes than an array has: all of it


def moved_bytes(module: Module, inside: Computation, it: Instruction) -> tuple[Counter[int], Counter[int]]:
    """Bytes that one instruction reads, and those that it writes, by memory space."""
    if it.opcode in FREE or it.opcode.endswith("-done"):
        return Counter(), Counter()
    if it.opcode == "custom-call" and it.quoted("custom_call_target") in FREE_CALLS:
        return Counter(), Counter()
    operands, results = inside.operand_shapes(it), arrays(_result(it))
    reads, writes = [WHOLE] * len(operands), [WHOLE] * len(results)
    if it.opcode == "fusion":
        fused = module.called(it)
        if _makes_call(fused, "AsyncCollectiveDone"):  # a wait
            return Counter(), Counter()
        reads = [_read_of(module, fused, name, lambda: WHOLE) for name in fused.parameters]
        writes = [_written(module, fused, name) for name in fused.results]
        if len(results) > len(writes) == 1:
            # A collective that is started here: its result is (operand, result, contexts), the operand aliased.
            results = results[1:2]
    elif it.opcode.removesuffix("-start") in SLICES:
        reads[0] = _size(_result(it))
    elif it.opcode == "dynamic-update-slice":
        reads[0], writes[0] = 0, _size(operands[1])
    elif it.opcode == "scatter" and len(operands) == 3:
        reads[0] = writes[0] = _size(operands[2])
    return _by_space(operands, reads), _by_space(results, writes)


def _result(it: Instruction) -> Tree:
    """What an instruction writes: of the tuple that starts an asynchronous one, whose other parts are its operands."""
    if isinstance(it.shape, tuple) and it.opcode.endswith("-start") and it.opcode != "all-reduce-start":
        return it.shape[0 if it.opcode == "copy-start" else 1]
    return it.shape


def _size(tree: Tree) -> int:
    return sum(array.stored_bytes for array in arrays(tree))


def _by_space(trees: Iterable[Tree], sizes: Iterable[float]) -> Counter[int]:
    """Bytes by memory space, of each value at most what is given."""
    moved: Counter[int] = Counter()
    for tree, size in zip(trees, sizes, strict=True):
        for array in arrays(tree):
            moved[array.space] += min(array.stored_bytes, size)  # type: ignore[assignment]
    return moved


def _makes_call(fused: Computation, target: str) -> bool:
    return any(it.opcode == "custom-call" and target in it.text for it in fused.instructions.values())


def starts_collective(fused: Computation) -> bool:
    """Whether a fusion starts a collective that runs on beside later fusions."""
    return _makes_call(fused, "AsyncCollectiveStart")


def continues_collective(fused: Computation) -> bool:
    """Whether a fusion continues, or waits for, a collective that an earlier one started.

    TPU writes such a collective into each of them: the start, products that run beside it, and the wait.
    """
    return fused.name.startswith("async_collective_fusion") or _makes_call(fused, "AsyncCollectiveDone")


def _read_of(module: Module, fused: Computation, name: str, of_result: Callable[[], float]) -> float:
    """Bytes that a fusion reads of a value inside it: of one that is only sliced, the slices.

    `of_result` tells how much is read of the fusion's own result, where it is inside another fusion.
    """
    read = of_result() if name == fused.root else 0
    for user, i in fused.users.get(name, ()):
        of_user = functools.partial(_read_of, module, fused, user.name, of_result)
        if user.opcode in SLICES and i == 0:
            read += _size(user.shape)
        elif user.opcode == "scatter" and i == 0 and len(user.operands) == 3:  # updated in place, perhaps added to
            read += _size(fused.operand_shapes(user)[2])
        elif user.opcode in ("bitcast", "copy"):  # inside a fusion a copy is in no memory: a name for another layout
            read += of_user()
        elif user.opcode == "fusion":
            inner = module.called(user)
            read += _read_of(module, inner, inner.parameters[i], of_user)
        elif not (
            (user.opcode == "dynamic-update-slice" and i == 0)  # updated in place
            or user.opcode == "tuple"  # passed through as it is
            or (user.opcode in COLLECTIVES and continues_collective(fused))  # moved beside what the fusion computes
        ):
            read += WHOLE
    return read


def _written(module: Module, fused: Computation, name: str) -> float:
    """Bytes that a fusion writes of one of its results: of an update in place the update."""
    it = fused.instructions[name]
    if it.opcode == "bitcast":
        return _written(module, fused, it.operands[0])
    if it.opcode == "dynamic-update-slice":
        return _size(fused.operand_shapes(it)[1])
    if it.opcode == "scatter" and len(it.operands) == 3 and fused.instructions[it.operands[0]].opcode == "parameter":
        return _size(fused.operand_shapes(it)[2])
    if it.opcode == "fusion":
        inner = module.called(it)
        return _written(module, inner, inner.results[0]) if len(inner.results) == 1 else WHOLE
    return 0 if it.opcode == "parameter" or (it.opcode in COLLECTIVES and continues_collective(fused)) else WHOLE
