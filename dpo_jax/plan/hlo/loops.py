"""How often the loops of an HLO module run."""

import dataclasses
import re

from dpo_jax.plan.hlo.text import Computation, Instruction, Module

# A number as (the item of the loop's tuple that it is, or None, and what is added to it).
_Affine = tuple[int | None, int]
_COPIES = ("copy", "bitcast", "convert", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class _Value:
    """What an instruction makes where its computation is called by `caller`; None: by a loop, or by nothing."""

    inside: Computation
    name: str
    caller: "_Value | None" = None

    @property
    def it(self) -> Instruction:
        return self.inside.instructions[self.name]

    def operand(self, i: int) -> "_Value":
        return dataclasses.replace(self, name=self.it.operands[i])


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body: as XLA noted, or by its counter, bound and step. None if neither tells."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if noted:
        return int(noted[1])
    condition, body = (module.called(loop, key) for key in ("condition", "body"))
    test, start, end = (
        _source(module, _Value(*at))
        for at in ((condition, condition.root), (inside, loop.operands[0]), (body, body.root))
    )
    direction = test.it.find(r"direction=(\w+)")
    if (test.it.opcode, start.it.opcode, end.it.opcode) != ("compare", "tuple", "tuple") or not direction:
        return None
    counter, bound, relation = _affine(module, test.operand(0)), _affine(module, test.operand(1)), direction[1]
    if counter is not None and counter[0] is None:  # the constant is on the left
        turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
        counter, bound, relation = bound, counter, turned.get(relation, relation)
    if counter is None or bound is None or counter[0] is None:
        return None
    if bound[0] is not None and _affine(module, end.operand(bound[0])) != (bound[0], 0):
        return None
    first, last = (_at_start(module, start, number) for number in (counter, bound))
    item, step = _affine(module, end.operand(counter[0])) or (None, 0)
    if first is None or last is None or item != counter[0] or step == 0:
        return None
    last += {"LE": 1, "GE": -1}.get(relation, 0)
    ends = {"LT": step > 0, "LE": step > 0, "GT": step < 0, "GE": step < 0, "NE": (last - first) % step == 0}
    return len(range(first, last, step)) if ends.get(relation) else None


def _at_start(module: Module, start: _Value, number: _Affine) -> int | None:
    """The value of a number when the loop starts, if that is a constant."""
    item, added = number
    if item is None:
        return added
    given = _affine(module, start.operand(item))
    return given[1] + added if given and given[0] is None else None


def _source(module: Module, value: _Value) -> _Value:
    """Where a value comes from, through copies, fusions, calls and tuples."""
    it = value.it
    if it.opcode in _COPIES:
        return _source(module, value.operand(0))
    if it.opcode in ("fusion", "call"):
        callee = module.called(it)
        return _source(module, _Value(callee, callee.root, value))
    if it.opcode == "parameter" and value.caller:
        return _source(module, value.caller.operand(int(it.literal)))
    if it.opcode == "get-tuple-element":
        whole = _source(module, value.operand(0))
        if whole.it.opcode == "tuple":
            return _source(module, whole.operand(_index(it)))
    return value


def _index(it: Instruction) -> int:
    return int(it.find(r"index=(\d+)")[1])  # type: ignore[index]


def _affine(module: Module, value: _Value) -> _Affine | None:
    """A number of a loop's condition, body or surroundings."""
    value = _source(module, value)
    it = value.it
    if it.opcode == "constant" and re.fullmatch(r"-?\d+", it.literal):
        return None, int(it.literal)
    if it.opcode == "get-tuple-element" and _source(module, value.operand(0)).it.opcode == "parameter":
        return _index(it), 0
    if it.opcode in ("add", "subtract"):
        left, right = (_affine(module, value.operand(i)) for i in (0, 1))
        if left and right and it.opcode == "add" and None in (left[0], right[0]):
            return (right[0] if left[0] is None else left[0]), left[1] + right[1]
        if left and right and it.opcode == "subtract" and right[0] is None:
            return left[0], left[1] - right[1]
    return None
