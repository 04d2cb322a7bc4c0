"""How often the loops of an HLO module run."""

import re

from dpo_jax.plan.hlo.text import Computation, Instruction, Module

# A number as (which item of the loop's tuple it is, or None, and what is added to it).
_Affine = tuple[int | None, int]


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body: what XLA noted, or what counter, bound and step say. None if neither tells."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if noted:
        return int(noted[1])
    condition, body = (module.of(loop.called(key), loop) for key in ("condition", "body"))
    compared = _comparison(module, condition)
    start = inside.instructions.get(loop.operands[0])
    end = body.instructions[body.root]
    if compared is None or start is None or start.opcode != "tuple" or end.opcode != "tuple":
        return None
    (item, offset), bound, direction = compared
    if item is None:
        return None

    def initial(number: _Affine) -> int | None:
        """The value when the loop starts, of a constant or of an item that the body does not change."""
        if number[0] is None:
            return number[1]
        found = _affine(module, inside, start.operands[number[0]])
        return None if found is None or found[0] is not None else found[1] + number[1]

    if bound[0] is not None and _affine(module, body, end.operands[bound[0]]) != (bound[0], 0):
        return None
    first, last = initial((item, offset)), initial(bound)
    after = _affine(module, body, end.operands[item])
    if first is None or last is None or after is None or after[0] != item or after[1] == 0:
        return None
    step = after[1]
    last += {"LE": 1, "GE": -1}.get(direction, 0)
    if direction == "NE" and (last - first) % step:
        return None
    if (direction in ("LT", "LE") and step < 0) or (direction in ("GT", "GE") and step > 0):
        return None
    return max(0, -(-(last - first) // step)) if direction != "EQ" else None


def _comparison(module: Module, condition: Computation) -> tuple[_Affine, _Affine, str] | None:
    """What a loop's condition compares: (counter, bound, direction)."""
    inside, root = condition, condition.instructions[condition.root]
    arguments: list[_Affine | None] | None = None
    while root.opcode in ("fusion", "call"):
        arguments = [_affine(module, inside, name, arguments) for name in root.operands]
        inside = module.of(root.called("calls") or root.called("to_apply"), root)
        root = inside.instructions[inside.root]
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode != "compare" or not direction:
        return None
    left, right = (_affine(module, inside, name, arguments) for name in root.operands)
    if left is None or right is None:
        return None
    if left[0] is None:
        turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
        return right, left, turned.get(direction[1], direction[1])
    return left, right, direction[1]


def _affine(
    module: Module, inside: Computation, name: str, arguments: list[_Affine | None] | None = None
) -> _Affine | None:
    """A number of a loop's condition, body or surroundings; `arguments` are those of a fusion around it."""
    it = inside.instructions[name]
    if it.opcode == "constant":
        return (None, int(it.literal)) if re.fullmatch(r"-?\d+", it.literal) else None
    if it.opcode == "parameter":
        return None if arguments is None else arguments[int(it.literal)]
    if it.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
        return _affine(module, inside, it.operands[0], arguments)
    if it.opcode in ("add", "subtract"):
        left, right = (_affine(module, inside, operand, arguments) for operand in it.operands)
        if left is None or right is None or (left[0] is not None and right[0] is not None):
            return None
        if it.opcode == "add":
            return (right[0] if left[0] is None else left[0]), left[1] + right[1]
        return None if right[0] is not None else (left[0], left[1] - right[1])
    if it.opcode in ("fusion", "call"):
        callee = module.of(it.called("calls") or it.called("to_apply"), it)
        return _affine(module, callee, callee.root, [_affine(module, inside, o, arguments) for o in it.operands])
    if it.opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", it.attributes)[1])  # type: ignore[index]
        source = inside.instructions[it.operands[0]]
        if source.opcode == "parameter" and arguments is None:
            return index, 0
        if source.opcode == "fusion":
            callee = module.of(source.called("calls"), source)
            root = callee.instructions[callee.root]
            if root.opcode == "tuple":
                given = [_affine(module, inside, o, arguments) for o in source.operands]
                return _affine(module, callee, root.operands[index], given)
    return None
