"""Counts what a compiled program moves: bytes, kernels and collectives.

Every instruction at the top of the entry computation, or of a loop or a call there, is a kernel: it
reads its operands from the memory of the device and writes its results there. What a fusion reads
only through slices counts as those slices, what it updates in place as the update, and the body of
a loop as often as the loop runs. Arrays that a TPU holds on the chip cost nothing, others with the
padding of their layout.
"""

import dataclasses
import math
import re
from collections import Counter

from benchmarks.compilers.hlo import Array, Computation, Instruction, Module, Shape, parse

FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "opt-barrier", "domain"),
    *("after-all", "add-dependency", "partition-id", "replica-id"),
}
FREE_CALLS = {"ConcatBitcast", "AllocateBuffer", "Sharding"}  # custom calls that only name memory
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
MEASURES = ("operations", "operands", "bytes")
SLICES = {"slice", "dynamic-slice", "gather"}
VIEWS = {"bitcast", "convert", "copy", "reshape", "transpose"}  # element by element


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program moves.

    Attributes:
      read: bytes that kernels read.
      written: bytes that kernels write.
      workspace: bytes that library calls ask for besides.
      kernels: how many are started.
      collectives: by kind, how many `operations`, on how many `operands` of how many `bytes`.
    """

    read: int
    written: int
    workspace: int
    kernels: int
    collectives: dict[str, dict[str, int]]

    @property
    def bytes(self) -> int:
        return self.read + self.written


def count(text: str) -> Traffic:
    """The traffic of an optimized HLO program.

    Raises:
      ValueError: for text that is none, or a loop of which the text does not say how often it runs.

    Example:
      >>> found = count('''
      ... ENTRY %main (x: f32[8]) -> f32[2] {
      ...   %x = f32[8]{0} parameter(0)
      ...   ROOT %y = f32[2]{0} slice(%x), slice={[2:4]}
      ... }''')
      >>> found.kernels, found.read, found.written
      (1, 8, 8)
    """
    module = parse(text)
    total = _computation(module, module.entry)
    collectives = {
        kind: {measure: total[f"{kind} {measure}"] for measure in MEASURES}
        for kind in COLLECTIVES
        if total[f"{kind} operations"]
    }
    numbers = {name: total[name] for name in ("read", "written", "workspace", "kernels")}
    return Traffic(**numbers, collectives=collectives)


def _computation(module: Module, name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in module.computations[name].instructions.values():
        total.update(_instruction(module, module.computations[name], one))
    return total


def _instruction(module: Module, computation: Computation, one: Instruction) -> Counter[str]:
    opcode = one.opcode.removesuffix("-start")
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return Counter()
    if opcode == "custom-call" and any(f'"{name}"' in one.attributes for name in FREE_CALLS):
        return Counter()
    if opcode == "while":
        runs, (body,) = trips(module, computation, one), one.called("body")
        return Counter({key: runs * n for key, n in _computation(module, body).items()})
    if opcode == "conditional":
        keys = ("branch_computations", "true_computation", "false_computation")
        branches = [_computation(module, name) for key in keys for name in one.called(key)]
        return max(branches, key=lambda found: found["read"] + found["written"])
    if opcode in ("call", "async"):
        (called,) = one.called("to_apply", "calls")
        return _computation(module, called)
    found = Counter({"kernels": 1})
    arguments = [computation.instructions[name].shape for name in one.operands]
    for place in {name: place for place, name in enumerate(one.operands)}.values():
        found["read"] += _read(module, one, opcode, place, arguments[place])
    results = _leaves(_result(one, opcode))
    if opcode == "custom-call" and len(results) > 1 and _is_workspace(results[-1]):
        found["workspace"] = results.pop().moved
    for place, result in enumerate(results):
        found["written"] += _share(result, _updated(module, one, opcode, place, arguments))
    found.update(_collectives(module, one, opcode, arguments))
    return found


def _leaves(shape: Shape) -> list[Array]:
    return [shape] if isinstance(shape, Array) else [a for part in shape for a in _leaves(part)]


def _result(one, opcode):
    """The type of what is computed, which asynchronous operations have beside their operands."""
    if opcode == one.opcode or opcode == "all-reduce":
        return one.shape
    return one.shape[0 if opcode == "copy" else 1]


def _is_workspace(array):
    return array.bits == 8 and len(array.dims) == 1


def _share(array, elements):
    """Bytes that move for some elements of an array."""
    return array.moved * min(elements, array.elements) // max(array.elements, 1)


def _read(module, one, opcode, place, shape):
    """Bytes of an operand that an instruction reads."""
    if opcode == "fusion" and isinstance(shape, Array):
        (called,) = one.called("calls")
        inner = module.computations[called]
        return _share(shape, _touched(module, inner, inner.parameters[place]))
    if place == 0 and opcode in SLICES:
        return sum(_share(shape, array.elements) for array in _leaves(_result(one, opcode)))
    if place == 0 and opcode == "dynamic-update-slice":
        return 0
    return sum(array.moved for array in _leaves(shape))


def _touched(module, computation, name):
    """How many elements of an instruction the others of a computation need."""
    whole = sum(array.elements for array in _leaves(computation.instructions[name].shape))
    if name == computation.root:
        return whole
    total = 0
    for user, place in computation.users[name]:
        if user.opcode in SLICES and place == 0:
            total += sum(array.elements for array in _leaves(user.shape))
        elif user.opcode in VIEWS or _is_view(module, user):
            total += _touched(module, computation, user.name)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            # In place where it is what the fusion returns.
            total += 0 if _returned(computation, user.name) else whole
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            total += _touched(module, inner, inner.parameters[place])
        else:
            return whole
    return min(total, whole)


def _is_view(module, one):
    """Whether a fusion in a fusion is one operand element by element: the tiles of a TPU."""
    if one.opcode != "fusion" or len(one.operands) != 1:
        return False
    inner = module.computations[one.called("calls")[0]].instructions.values()
    return all(each.opcode in (*VIEWS, "parameter") for each in inner)


def _returned(computation, name):
    """Whether an instruction is nothing but a result, or a part of it."""
    users = [user for user, _ in computation.users[name]]
    if not users:
        return name == computation.root
    return all(
        user.name == computation.root
        if user.opcode == "tuple"
        else user.opcode == "bitcast" and _returned(computation, user.name)
        for user in users
    )


def _updated(module, one, opcode, place, arguments):
    """How many elements an instruction writes of one of its results, at most."""
    if opcode == "dynamic-update-slice":
        return arguments[1].elements
    if opcode != "fusion":
        return math.inf
    called = module.computations[one.called("calls")[0]]
    inner, root = called.instructions, called.instructions[called.root]
    if root.opcode == "tuple":
        root = inner[root.operands[place]]
    while root.opcode == "bitcast":
        root = inner[root.operands[0]]
    if root.opcode not in ("fusion", "dynamic-update-slice"):
        return math.inf
    return _updated(module, root, root.opcode, 0, [inner[name].shape for name in root.operands])


def _collectives(module, one, opcode, arguments):
    """Operations between devices, with the number and the bytes of their operands."""
    if opcode == "fusion":
        inner = module.computations[one.called("calls")[0]].instructions
        found: Counter[str] = Counter()
        for each in inner.values():
            shapes = [inner[name].shape for name in each.operands if name in inner]
            found.update(_collectives(module, each, each.opcode.removesuffix("-start"), shapes))
        return found
    if opcode not in COLLECTIVES:
        return Counter()
    operands = [array for shape in arguments for array in _leaves(shape)]
    numbers = (1, len(operands), sum(array.bytes for array in operands))
    return Counter({f"{opcode} {m}": n for m, n in zip(MEASURES, numbers, strict=True)})


def is_exception(loop: str) -> bool:
    """Whether a loop, of which this is the text, runs for extraordinary data only."""
    return "where_inexact" in loop


def trips(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often a loop runs: as the compiler notes, or as its counter says.

    A counter starts at a constant, has a constant added by the body, and is compared with a
    constant by the condition. A loop that runs for extraordinary data only counts as one run.

    Raises:
      ValueError: if the text says neither.
    """
    noted = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    if is_exception(loop.attributes):
        return 1
    runs = _counted(module, computation, loop)
    if runs is None:
        raise ValueError(f"the text does not say how often the loop {loop.name} runs")
    return runs


def _counted(module, computation, loop):
    condition, body = (module.computations[loop.called(key)[0]] for key in ("condition", "body"))
    test = _source(condition, condition.root)
    direction = re.search(r"direction=(LT|LE)", test.attributes)
    if test.opcode != "compare" or direction is None:
        return None
    counter, bound = (_source(condition, name) for name in test.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or place is None:
        return None
    carried = (computation, loop.operands[0]), (body, body.root)
    tuples = [where.instructions[name] for where, name in carried]
    if any(one.opcode != "tuple" for one in tuples):
        return None
    entering, after = (
        _source(where, one.operands[int(place[1])])
        for (where, _), one in zip(carried, tuples, strict=True)
    )
    if after.opcode != "add":
        return None
    steps = [_constant(_source(body, name)) for name in after.operands]
    first, last, step = _constant(entering), _constant(bound), sum(n or 0 for n in steps)
    if first is None or last is None or step < 1:
        return None
    return max(0, -(-(last + (direction[1] == "LE") - first) // step))


def _source(computation, name):
    """The instruction of which another is a view."""
    one = computation.instructions[name]
    while one.opcode in VIEWS:
        one = computation.instructions[one.operands[0]]
    return one


def _constant(one):
    whole = one.opcode == "constant" and re.fullmatch(r"-?\d+", one.operands[0])
    return int(one.operands[0]) if whole else None
