"""Reads optimized HLO text (`compiled.as_text()`) of XLA for TPU and CPU: computations, instructions, shapes.

Only the text's structure is read here; what instructions cost is `hlo.py`'s. What is not understood is an error with
the line's number, never skipped: a cost that is silently missing is worse than none.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits of an element; `token`, `opaque` and tuples of nothing have none.
BITS = {
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s1", "u1"), 1),
    **dict.fromkeys(("s2", "u2"), 2),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 4),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 64),
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
# What a layout's S(n) says on TPU: 0, which is not written, is HBM and 5 the host's memory. The others (1 is VMEM, 2
# are semaphores, 6 is SMEM) are on the chip.
HBM, HOST = 0, 5

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"/\*.*?\*/")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_OPERAND = re.compile(r"%([\w.-]+)")
_SECTION = re.compile(r"HloModule |(FileNames|FunctionNames|FileLocations|StackFrames)$|\d+ |\s*$")


class HloError(ValueError):
    """HLO text with something that this reader does not know, or does not find."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: its dtype, its dimensions, and its layout as it is written (memory space and tiles among it)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of its values, without the padding of tiles."""
        return (self.elements * self.bits + 7) // 8

    @property
    def bits(self) -> int:
        if self.dtype in BITS:
            return BITS[self.dtype]
        if self.dtype.startswith("f8"):
            return 8
        raise HloError(f"dtype {self.dtype!r} is not known; add its size to hlo_text.BITS")

    @property
    def space(self) -> int:
        """The memory in which it lies (`HBM`, `HOST`, or another number: on the chip)."""
        found = re.search(r"(?<![A-Z])S\((\d+)\)", self.layout)
        return int(found[1]) if found else HBM

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in memory: its minor dimensions are padded to whole tiles, such as 8 x 128."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not self.dims or not order:
            return self.bytes
        dims = [self.dims[int(axis)] for axis in order.split(",")]  # minor first
        sizes = [int(size) for size in reversed(tile[1].split(","))]
        for i, size in enumerate(sizes[: len(dims)]):
            dims[i] = -(-dims[i] // size) * size
        return (math.prod(dims) * self.bits + 7) // 8


# The shape of a value: an array, or a tuple of such.
Tree = Shape | tuple["Tree", ...]


def leaves(tree: Tree) -> Iterator[Shape]:
    """The arrays of a shape."""
    if isinstance(tree, Shape):
        yield tree
    else:
        for part in tree:
            yield from leaves(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name, opcode: without `%`.
      shape: of the result.
      operands: names.
      attributes: what follows the operands, with the contents of all quoted strings taken out.
      text: the whole instruction as it was, quoted strings included.
      literal: what stands between the parentheses: a parameter's number, a constant's value.
      line: its number in the text, from 1.
    """

    name: str
    opcode: str
    shape: Tree
    operands: tuple[str, ...]
    attributes: str
    text: str
    literal: str
    line: int

    def called(self, key: str) -> str | None:
        """The computation that an attribute names, as in `body=%region`."""
        found = re.search(rf"(?<!\w){key}=%?([\w.-]+)", self.attributes)
        return found[1] if found else None

    def braced(self, key: str) -> str | None:
        """What an attribute holds in its braces, as `2,1` of `dimensions={2,1}`; one level of braces inside."""
        found = re.search(rf"(?<!\w){key}=\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", self.attributes)
        return found[1] if found else None

    def quoted(self, key: str) -> str | None:
        """What a `key="..."` says."""
        found = re.search(rf'(?<!\w){key}="((?:[^"\\]|\\.)*)"', self.text)
        return found[1] if found else None

    def error(self, problem: str) -> HloError:
        return HloError(f"HLO line {self.line}: {problem}: {self.text.strip()[:200]}")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who uses an instruction, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for i, name in enumerate(instruction.operands):
                found.setdefault(name, []).append((instruction, i))
        return found

    def shape(self, name: str, user: Instruction) -> Tree:
        if name not in self.instructions:
            raise user.error(f"operand {name} is not in its computation {self.name}")
        return self.instructions[name].shape

    def operand_shapes(self, instruction: Instruction) -> list[Tree]:
        return [self.shape(name, instruction) for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, the one that is run, and over how many devices it was partitioned."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def of(self, name: str | None, user: Instruction) -> Computation:
        if name is None or name not in self.computations:
            raise user.error(f"no computation {name!r}")
        return self.computations[name]


def parse(text: str) -> Module:
    """Read a module.

    Raises:
      HloError: the text has a line that is not understood, or no entry.
    """
    computations: dict[str, Computation] = {}
    entry = None
    head: tuple[str, bool] | None = None
    instructions: dict[str, Instruction] = {}
    root = ""
    lines = iter(enumerate(text.split("\n"), 1))
    for number, line in lines:
        if head is None:
            if not _SECTION.match(line):
                found = _HEAD.match(line)
                if not found:
                    raise HloError(f"HLO line {number}: neither a computation nor a known section: {line[:200]}")
                head, instructions, root = (found[2], bool(found[1])), {}, ""
        elif line.startswith("}"):
            root = root or next(reversed(instructions), "")
            computations[head[0]] = Computation(head[0], instructions, root)
            entry, head = (head[0] if head[1] else entry), None
        elif line.strip():
            statement, scrubbed = _statement(line, number, lines)
            instruction = _instruction(statement, scrubbed, number)
            instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                root = instruction.name
    if head is not None or entry is None:
        raise HloError("the HLO text ends inside a computation" if head else "the HLO text has no ENTRY computation")
    header = text[: text.index("\n")]
    counts = [re.search(rf"{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(int(found[1]) for found in counts if found))


def _statement(line: str, number: int, lines: Iterator[tuple[int, str]]) -> tuple[str, str]:
    """A whole instruction, which may go over several lines, as it is and with its quoted strings emptied."""
    parts, scrubbed = [line], _scrub(line)
    depth = scrubbed.count("{") - scrubbed.count("}")
    while depth > 0:
        following = next(lines, None)
        if following is None:
            raise HloError(f"HLO line {number}: its braces are never closed: {line[:200]}")
        more = _scrub(following[1])
        depth += more.count("{") - more.count("}")
        parts.append(following[1])
        scrubbed += "\n" + more
    return "\n".join(parts), scrubbed


def _scrub(line: str) -> str:
    return _COMMENT.sub("", _QUOTED.sub('""', line))


def _instruction(statement: str, scrubbed: str, number: int) -> Instruction:
    found = _INSTRUCTION.match(scrubbed)
    if not found:
        raise HloError(f"HLO line {number}: not an instruction: {statement.strip()[:200]}")
    shape, at = _shape(scrubbed, found.end(), number)
    opcode = _OPCODE.match(scrubbed, at)
    if not opcode:
        raise HloError(f"HLO line {number}: no opcode after the shape: {statement.strip()[:200]}")
    end = _closing(scrubbed, opcode.end(), number)
    literal = scrubbed[opcode.end() : end]
    names = () if opcode[1] in ("constant", "parameter") else tuple(_OPERAND.findall(literal))
    if literal.strip() and not names and opcode[1] not in ("constant", "parameter", "iota"):
        raise HloError(f"HLO line {number}: operands without names: {statement.strip()[:200]}")
    return Instruction(found[2], opcode[1], shape, names, scrubbed[end + 1 :], statement, literal.strip(), number)


def _shape(text: str, at: int, number: int) -> tuple[Tree, int]:
    """A shape that begins at `at`, and where it ends."""
    while text[at] == " ":
        at += 1
    if text[at] == "(":
        parts: list[Tree] = []
        at += 1
        while True:
            while text[at] in " ,":
                at += 1
            if text[at] == ")":
                return tuple(parts), at + 1
            part, at = _shape(text, at, number)
            parts.append(part)
    found = _SHAPE.match(text, at)
    if not found:
        raise HloError(f"HLO line {number}: no shape: {text[at : at + 200]}")
    dims = tuple(int(size.lstrip("<=")) for size in found[2].split(",") if size)
    return Shape(found[1], dims, found[3] or ""), found.end()


def _closing(text: str, at: int, number: int) -> int:
    """Where the parenthesis is closed that was opened before `at`."""
    depth = 1
    for found in re.compile(r"[()]").finditer(text, at):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise HloError(f"HLO line {number}: a parenthesis is never closed: {text.strip()[:200]}")
