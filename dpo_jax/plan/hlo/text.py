"""Reads optimized HLO text (`compiled.as_text()`) of XLA for TPU and CPU: computations, instructions, shapes.

Only the structure of the text is read here; `count.py` knows what instructions cost. Text that is not understood is an
error with its line's number, never skipped: a cost that is silently missing is worse than none.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# What `S(n)` in a layout means on TPU: 0, which is not written, is HBM and 5 the host's memory. The others (1 is VMEM,
# 2 are semaphores, 6 is SMEM) are on the chip.
HBM, HOST = 0, 5

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"/\*.*?\*/")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = ")
_BITS = re.compile(r"(?:bf|[sufc])(1|2|4|8|16|32|64|128)(?!\d)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_GAP = re.compile(r"[ ,]*")
_OPERATION = re.compile(r"\s*([a-z][\w-]*)\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
_OPERAND = re.compile(r"%([\w.-]+)")
_SECTION = re.compile(r"HloModule |(FileNames|FunctionNames|FileLocations|StackFrames)$|\d+ |\s*$")


class HloError(ValueError):
    """HLO text with something that this reader does not know, or does not find."""


def _error(number: int, problem: str, text: str) -> HloError:
    return HloError(f"HLO line {number}: {problem}: {text.strip()[:200]}")


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
        """Bits of an element; tokens and opaque values have none."""
        if self.dtype in ("pred", "token", "opaque"):
            return 8 if self.dtype == "pred" else 0
        if bits := _BITS.match(self.dtype):
            return int(bits[1])
        raise HloError(f"dtype {self.dtype!r} is not known; add its size to Shape.bits")

    @property
    def space(self) -> int:
        """The memory that holds it (`HBM`, `HOST`, or another number: on the chip)."""
        space = re.search(r"(?<![A-Z])S\((\d+)\)", self.layout)
        return int(space[1]) if space else HBM

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in memory: its minor dimensions are padded to whole tiles, such as 8 x 128."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not self.dims or not order:
            return self.bytes
        dims = [self.dims[int(axis)] for axis in order.split(",")]  # minor first
        for i, size in enumerate(list(reversed(numbers(tile[1])))[: len(dims)]):
            dims[i] = -(-dims[i] // size) * size
        return (math.prod(dims) * self.bits + 7) // 8


# The shape of a value: an array, or a tuple of such.
Tree = Shape | tuple["Tree", ...]


def arrays(tree: Tree) -> list[Shape]:
    """The arrays of a shape."""
    return [tree] if isinstance(tree, Shape) else [leaf for part in tree for leaf in arrays(part)]


def numbers(text: str | None) -> list[int]:
    """`2,1` → [2, 1]."""
    return [int(n) for n in (text or "").split(",") if n]


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

    def find(self, pattern: str) -> re.Match[str] | None:
        """The first place among its attributes that fits."""
        return re.search(pattern, self.attributes)

    def braced(self, key: str) -> str | None:
        """What an attribute holds in its braces, as `2,1` of `dimensions={2,1}`; one level of braces inside."""
        value = self.find(rf"(?<!\w){key}=\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
        return value[1] if value else None

    def quoted(self, key: str) -> str:
        """The string of `key="..."`; empty if there is none."""
        value = re.search(rf'(?<!\w){key}="((?:[^"\\]|\\.)*)"', self.text)
        return value[1] if value else ""

    def error(self, problem: str) -> HloError:
        return _error(self.line, problem, self.text)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """The instructions that use a value, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for i, name in enumerate(instruction.operands):
                users.setdefault(name, []).append((instruction, i))
        return users

    @functools.cached_property
    def parameters(self) -> list[str]:
        """The names of its parameters, in order."""
        parameters = [it for it in self.instructions.values() if it.opcode == "parameter"]
        return [it.name for it in sorted(parameters, key=lambda it: int(it.literal))]

    @property
    def results(self) -> list[str]:
        """The instructions that make its result, or the parts of its result."""
        root = self.instructions[self.root]
        return list(root.operands) if root.opcode == "tuple" else [root.name]

    def operand_shapes(self, user: Instruction) -> list[Tree]:
        for name in user.operands:
            if name not in self.instructions:
                raise user.error(f"operand {name} is not in its computation {self.name}")
        return [self.instructions[name].shape for name in user.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, the one that is run, and over how many devices it was partitioned."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def called(self, it: Instruction, key: str = "calls|to_apply|called_computation") -> Computation:
        """The computation that a call or a fusion runs, or the one that an attribute `key` names (`body=%region`)."""
        name = it.find(rf"(?<!\w)(?:{key})=%?([\w.-]+)")
        return self.named(name[1] if name else None, it)

    def named(self, name: str | None, user: Instruction) -> Computation:
        if name is None or name not in self.computations:
            raise user.error(f"no computation {name!r}")
        return self.computations[name]


def parse_hlo(text: str) -> Module:
    """Read a module.

    Raises:
      HloError: the text has a line that is not understood, or no entry.
    """
    computations: dict[str, Computation] = {}
    entry = None
    lines = enumerate(text.split("\n"), 1)
    for number, line in lines:
        if _SECTION.match(line):
            continue
        head = _HEAD.match(line)
        if not head:
            raise _error(number, "neither a computation nor a known section", line)
        computations[head[2]] = _computation(head[2], lines)
        entry = head[2] if head[1] else entry
    if entry is None:
        raise HloError("the HLO text has no ENTRY computation")
    header = text[: text.index("\n")]
    return Module(
        computations, entry, math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)))
    )


def _computation(name: str, lines: Iterator[tuple[int, str]]) -> Computation:
    """The computation whose first instruction comes next."""
    instructions: dict[str, Instruction] = {}
    root = ""
    for number, line in lines:
        if line.startswith("}"):
            return Computation(name, instructions, root or next(reversed(instructions), ""))
        if line.strip():
            instruction = _instruction(number, line, lines)
            instructions[instruction.name] = instruction
            root = instruction.name if line.lstrip().startswith("ROOT ") else root
    raise HloError("the HLO text ends inside a computation")


def _instruction(number: int, line: str, lines: Iterator[tuple[int, str]]) -> Instruction:
    """The instruction that begins with `line`: of several lines where its braces are closed on a later one."""
    text, scrubbed = line, _scrub(line)
    while scrubbed.count("{") > scrubbed.count("}"):
        _, more = next(lines, (0, None))
        if more is None:
            raise _error(number, "its braces are never closed", line)
        text, scrubbed = f"{text}\n{more}", f"{scrubbed}\n{_scrub(more)}"
    head = _INSTRUCTION.match(scrubbed)
    if not head:
        raise _error(number, "not an instruction", text)
    shape, at = _shape(scrubbed, head.end(), number)
    operation = _OPERATION.match(scrubbed, at)
    if not operation:
        raise _error(number, "no opcode and operands after the shape", text)
    opcode, literal = operation[1], operation[2].strip()
    names = () if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(literal))
    if literal and not names and opcode not in ("constant", "parameter", "iota"):
        raise _error(number, "operands without names", text)
    return Instruction(head[2], opcode, shape, names, scrubbed[operation.end() :], text, literal, number)


def _scrub(line: str) -> str:
    """Without comments and what quoted strings hold."""
    return _COMMENT.sub("", _QUOTED.sub('""', line))


def _shape(text: str, at: int, number: int) -> tuple[Tree, int]:
    """A shape that begins at `at`, and where it ends."""
    if text.startswith("(", at):
        parts: list[Tree] = []
        at += 1
        while not text.startswith(")", at):
            part, at = _shape(text, at, number)
            parts.append(part)
            at = _GAP.match(text, at).end()  # type: ignore[union-attr]
        return tuple(parts), at + 1
    array = _ARRAY.match(text, at)
    if not array:
        raise _error(number, "no shape", text[at:])
    dims = tuple(int(size.lstrip("<=")) for size in array[2].split(",") if size)
    return Shape(array[1], dims, array[3] or ""), array.end()
