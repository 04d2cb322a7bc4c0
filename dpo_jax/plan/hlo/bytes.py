"""Bytes that one HLO instruction moves to and from memory."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable

from dpo_jax.plan.hlo.text import Computation, Instruction, Module, Shape, Tree, leaves

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
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
CALLS_WITHOUT_PRODUCTS = FREE_CALLS | {
    "GatherScatterIndicesBitpacked",
    "TopK",
    "ZeroCrop",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
}


def moved_bytes(module: Module, inside: Computation, it: Instruction) -> tuple[Counter[int], Counter[int]]:
    """Bytes that one instruction reads, and those that it writes, by memory space."""
    read: Counter[int] = Counter()
    written: Counter[int] = Counter()
    if it.opcode in FREE or it.opcode.endswith("-done"):
        return read, written
    operands = inside.operand_shapes(it)

    def add(moved: Counter[int], trees: Iterable[Tree]) -> None:
        for leaf in itertools.chain.from_iterable(leaves(tree) for tree in trees):
            moved[leaf.space] += leaf.stored_bytes

    if it.opcode == "fusion":
        callee = module.of(it.called("calls"), it)
        if _calls(callee, "AsyncCollectiveDone"):
            return read, written  # a wait
        for shape, size in zip(operands, _read_by_fusion(module, callee), strict=True):
            _add_part(read, shape, size)
        results, roots = list(leaves(it.shape)), _results(callee)
        if len(results) > len(roots) == 1:
            # A collective that is started here: its result is (operand, result, contexts), the operand aliased.
            results = results[1:2]
        for leaf, name in zip(results, roots, strict=True):
            _add_part(written, leaf, _written(module, callee, name))
    elif it.opcode.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
        # The result of a start is ((operands), result, context).
        result = it.shape if isinstance(it.shape, Shape) else it.shape[1]
        if not isinstance(result, Shape):
            raise it.error("a slice that is no array")
        written[result.space] += result.stored_bytes
        _add_part(read, operands[0], result.stored_bytes)
        add(read, operands[1:])
    elif it.opcode == "dynamic-update-slice":
        add(read, operands[1:])
        _add_part(written, it.shape, sum(leaf.stored_bytes for leaf in leaves(operands[1])))
    elif it.opcode == "copy-start":  # the result is (destination, source, context)
        assert not isinstance(it.shape, Shape)
        add(written, it.shape[:1])
        add(read, operands)
    elif it.opcode.endswith("-start") and not isinstance(it.shape, Shape):
        # The result of a start holds its operands again; those of an all-reduce are the results alone.
        add(read, operands)
        add(written, it.shape if it.opcode == "all-reduce-start" else it.shape[1:2])
    elif it.opcode == "custom-call" and it.quoted("custom_call_target") in FREE_CALLS:
        pass
    else:
        add(read, operands)
        add(written, [it.shape])
    return read, written


def _calls(callee: Computation, target: str) -> bool:
    return any(it.opcode == "custom-call" and target in it.text for it in callee.instructions.values())


def starts(callee: Computation) -> bool:
    """Whether a fusion starts a collective that later ones go on with."""
    return _calls(callee, "AsyncCollectiveStart")


def goes_on(callee: Computation) -> bool:
    """Whether a fusion goes on with, or waits for, a collective that an earlier one started.

    TPU writes such a collective into each of them: the start, products during which it goes on, and the wait.
    """
    return callee.name.startswith("async_collective_fusion") or _calls(callee, "AsyncCollectiveDone")


def _add_part(moved: Counter[int], shape: Tree, size: int | None) -> None:
    """Add some bytes of an array, all of them if None."""
    for leaf in leaves(shape):
        moved[leaf.space] += leaf.stored_bytes if size is None else min(size, leaf.stored_bytes)


def _results(callee: Computation) -> list[str]:
    """The instructions that make the results of a fusion."""
    root = callee.instructions[callee.root]
    return list(root.operands) if root.opcode == "tuple" else [root.name]


def _read_by_fusion(module: Module, callee: Computation) -> list[int | None]:
    """How many bytes a fusion reads of each operand; None for all of them.

    Of an operand that is only sliced, the slices; of one that is only updated in place, nothing.
    """
    whole = lambda: None
    return [_read_of(module, callee, name, whole) for name in _parameters(callee)]


def _parameters(callee: Computation) -> list[str]:
    found = {int(it.literal): it.name for it in callee.instructions.values() if it.opcode == "parameter"}
    return [found[i] for i in range(len(found))]


def _read_of(module: Module, callee: Computation, name: str, after: Callable[[], int | None]) -> int | None:
    """What is read of a value of a fusion; `after`: what is read of the fusion's result."""
    total = 0
    parts: list[int | None] = [after()] if name == callee.root else []
    for user, i in callee.users.get(name, ()):
        further = functools.partial(_read_of, module, callee, user.name, after)
        if user.opcode in ("dynamic-slice", "slice", "gather") and i == 0:
            parts.append(sum(leaf.stored_bytes for leaf in leaves(user.shape)))
        elif (user.opcode == "dynamic-update-slice" and i == 0) or user.opcode == "tuple":
            parts.append(0)  # updated in place, or handed on as it is
        elif user.opcode in COLLECTIVES and goes_on(callee):
            parts.append(0)  # moved by the interconnect beside what the fusion computes
        elif user.opcode == "bitcast":
            parts.append(further())
        elif user.opcode == "fusion":
            inner = module.of(user.called("calls"), user)
            parts.append(_read_of(module, inner, _parameters(inner)[i], further))
        else:
            parts.append(None)
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def _written(module: Module, callee: Computation, name: str) -> int | None:
    """How many bytes a result of a fusion writes: of an update in place the update; None for all of them."""
    it = callee.instructions[name]
    if it.opcode == "bitcast":
        return _written(module, callee, it.operands[0])
    if it.opcode == "dynamic-update-slice":
        return sum(leaf.stored_bytes for leaf in leaves(callee.shape(it.operands[1], it)))
    if it.opcode == "fusion":
        inner = module.of(it.called("calls"), it)
        names = _results(inner)
        return _written(module, inner, names[0]) if len(names) == 1 else None
    return 0 if it.opcode == "parameter" or (it.opcode in COLLECTIVES and goes_on(callee)) else None
