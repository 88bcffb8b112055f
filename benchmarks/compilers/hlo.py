"""Reads the text of an HLO program: computations of instructions on typed arrays."""

import dataclasses
import functools
import math
import re


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of an array.

    Attributes:
      bits: of an element.
      dims: of the array.
      padded: the same in the order of the memory, rounded up to whole tiles.
      space: 0 for the memory of the device, others for memory on the chip.
    """

    bits: int
    dims: tuple[int, ...]
    padded: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of its elements, without padding."""
        return self.elements * self.bits // 8

    @property
    def moved(self) -> int:
        """Bytes that move when all of it is read or written: none for an array on the chip."""
        return 0 if self.space else math.prod(self.padded) * self.bits // 8


Shape = Array | tuple["Shape", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`, with the names of the operands."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that stand under one of the keys in the attributes."""
        found = re.search(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the result of `root` is that of the computation."""

    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Their names by number."""
        return {
            int(i.operands[0]): i.name
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who uses an instruction, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            if instruction.opcode != "parameter":
                for place, name in enumerate(instruction.operands):
                    found.setdefault(name, []).append((instruction, place))
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name; the program runs `entry`."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The program that `text` is.

    Raises:
      ValueError: for text without an entry computation, or a line that is no instruction.

    Example:
      >>> module = parse('''
      ... ENTRY %main (x: f32[2,3]) -> f32[2,3] {
      ...   %x = f32[2,3]{1,0} parameter(0)
      ...   ROOT %y = f32[2,3]{1,0} exponential(%x)
      ... }''')
      >>> module.computations[module.entry].instructions["y"].opcode
      'exponential'
    """
    computations: dict[str, Computation] = {}
    entry, name = None, None
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            name, instructions, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif name is not None and line.startswith("}"):
            computations[name] = Computation(instructions, root)
            name = None
        elif name is not None and line.strip():
            one = _instruction(line)
            instructions[one.name] = one
            root = one.name if line.lstrip().startswith("ROOT ") else root
    if entry is None:
        raise ValueError("the text has no entry computation")
    return Module(computations, entry)


def _instruction(line):
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if found is None:
        raise ValueError(f"no instruction of HLO: {line.strip()[:80]!r}")
    rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = len(opcode) + _closing(rest[len(opcode) :])
    operands = [part.split()[-1].lstrip("%") for part in _split(rest[len(opcode) + 1 : end - 1])]
    return Instruction(found[1], parse_shape(shape), opcode, tuple(operands), rest[end:])


def _closing(text):
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place + 1
    raise ValueError(f"a parenthesis is not closed: {text[:80]!r}")


def _split(text):
    """Parts between commas that are in no parentheses."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def parse_shape(text: str) -> Shape:
    """The type that `text` is: of an array, or of a tuple of types.

    Example:
      >>> parse_shape("(bf16[5,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})")[0].padded
      (8, 128)
    """
    if text.startswith("("):
        return tuple(parse_shape(part) for part in _split(text[1:-1]))
    found = re.match(r"([a-z]\w*)\[([^\]]*)\](?:\{([\d,]*)(?::(.*))?\})?", text)
    if found is None:
        return Array(0, (), ())  # token[] has brackets, opaque types have not
    dims = tuple(int(size.strip("<=")) for size in found[2].split(",") if size)
    order = [int(axis) for axis in (found[3] or "").split(",") if axis]
    memory = found[4] or ""
    space = re.search(r"S\((\d+)\)", memory)
    physical = [dims[axis] for axis in reversed(order or range(len(dims))[::-1])]
    tile = re.search(r"T\(([\d,]+)\)", memory)
    if tile:
        sizes = [int(size) for size in tile[1].split(",")]
        physical = [1] * (len(sizes) - len(physical)) + physical
        for place, size in enumerate(sizes, start=len(physical) - len(sizes)):
            physical[place] = -(-physical[place] // size) * size
    return Array(_bits(found[1]), dims, tuple(physical), int(space[1]) if space else 0)


def _bits(dtype):
    if dtype == "pred":
        return 8
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0
