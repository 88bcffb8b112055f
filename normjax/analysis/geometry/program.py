"""The program of a function of one array as steps that are affine on cells, and branches."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from normjax.analysis.geometry.rules import CALLS, MOVES, RULES
from normjax.analysis.geometry.values import (
    Layer,
    Node,
    compute,
    constant,
    floating,
    is_variable,
    lifted,
    needed,
)


class Step(NamedTuple):
    """A step that is affine in each cell."""

    run: Callable[..., list[np.ndarray]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Branch(NamedTuple):
    """A step that is affine once cells are divided by its units.

    `functions` gives arrays [cells, coordinates + 1, units, functions], and how large they were
    before cancellation, [cells, units]. Of one function the sign decides; of several, which is the
    largest. `finish` takes the decisions [cells, units], and the inputs.
    """

    layer: Layer
    label: int  # of the first unit
    functions: Callable[..., tuple[np.ndarray, np.ndarray]]
    finish: Callable[..., np.ndarray]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass
class Program:
    """A function as steps in float64; `dimension`: coordinates of the cells that it is for."""

    caller: str
    dimension: int
    input: Any = None
    output: Any = None
    steps: list[Step | Branch] = dataclasses.field(default_factory=list)
    alive: list[set[int]] = dataclasses.field(default_factory=list)
    nodes: int = 0
    units: int = 0  # of all branches
    size: int = 1  # numbers that the largest step holds for each cell

    @classmethod
    def of(cls, caller: str, f: Callable, shape: tuple[int, ...], dimension: int) -> "Program":
        """Traces a function for an input of a shape. ValueError for what is not piecewise affine,
        TypeError for a function that does not return one floating array."""
        program = cls(caller, dimension)
        with jax.enable_x64(True):
            traced, out = jax.make_jaxpr(f, return_shape=True)(jax.ShapeDtypeStruct(shape, float))
            if not (hasattr(out, "dtype") and floating(out.dtype)):
                raise TypeError(f"{caller}: f returns {out}, but must return one floating array.")
            program.input = program.node(shape)
            consts = map(constant, traced.consts)
            (program.output,) = program.walk(traced.jaxpr, [*consts, program.input], [True])
            program.output = program.affine_output()
        program.alive = program.nodes_behind()
        return program

    def affine_output(self):
        """The output as a node that is not flat."""
        if isinstance(self.output, Node):
            return self.affine(lambda a: a, [self.output], self.output.shape)[0]
        repeat = lambda x, a: np.broadcast_to(a, (len(x), *a.shape[1:]))
        return self.affine(repeat, [self.input, self.output], self.output.shape)[0]

    def nodes_behind(self) -> list[set[int]]:
        """For each step the nodes that the steps behind it take, and the output."""
        alive = [{self.output.number}]
        for step in self.steps[:0:-1]:
            alive.append((alive[-1] - set(step.outputs)) | set(step.inputs))
        return alive[::-1]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(step.layer for step in self.steps if isinstance(step, Branch))

    def error(self, name, what="of a value that depends on the input is not piecewise affine"):
        return ValueError(
            f"{self.caller}: `{name}` {what}. Of activations take relu, leaky_relu, abs, max_pool "
            "and the like; of norms, those that evaluate with running statistics: statistics of "
            "the sample, as in LayerNorm, or of a batch depend on the input."
        )

    def walk(self, traced, args, wanted):
        """Adds the steps of a traced program; returns its results, None if not `wanted`."""
        env = dict(zip([*traced.constvars, *traced.invars], args, strict=True))
        read = lambda v: env[v] if is_variable(v) else constant(v.val)
        for eqn, used in needed(traced, wanted):
            outputs = self.equation(eqn, list(map(read, eqn.invars)), used)
            env |= zip(eqn.outvars, outputs, strict=True)
        return [read(v) if use else None for v, use in zip(traced.outvars, wanted, strict=True)]

    def equation(self, eqn, inputs, used):
        name = eqn.primitive.name
        if name in CALLS:
            inner, consts = _called(eqn.params[CALLS[name]])
            return self.walk(inner, [*consts, *inputs], used)
        if name == "scan":
            return self.scan(eqn, inputs, used)
        if not any(isinstance(value, Node) for value in inputs):
            return compute(eqn, inputs)
        if name in MOVES:
            return self.move(eqn, inputs)
        if name not in RULES:
            raise self.error(name)
        return RULES[name](self, eqn, *inputs)

    def node(self, shape, flat=False):
        self.nodes += 1
        return Node(self.nodes, tuple(shape), flat)

    def add(self, run, nodes, *shapes, size=0, flat=None):
        """A step over nodes; its outputs are flat if all inputs are, unless `flat` says it."""
        flat = all(node.flat for node in nodes) if flat is None else flat
        outputs = [self.node(shape, flat) for shape in shapes]
        size += sum(math.prod(node.shape) for node in (*nodes, *outputs))
        self.size = max(self.size, size * (self.dimension + 1))
        numbers = (tuple(node.number for node in each) for each in (nodes, outputs))
        self.steps.append(Step(run, *numbers))
        return outputs

    def affine(self, function, operands, shape, size=0):
        """A step over nodes and constants, which `function` gets as affine values alike."""
        fill, nodes = self.filler(operands), [a for a in operands if isinstance(a, Node)]
        run = lambda *arrays: [function(*fill(arrays))]
        return self.add(run, nodes, shape, size=size, flat=False)

    def branch(self, layer, shape, functions, finish, operands, *, count=1, flat=False):
        """A branch over nodes and constants, with `count` functions for each unit."""
        fill, nodes = self.filler(operands), [a for a in operands if isinstance(a, Node)]
        output = self.node(shape, flat)
        self.size = max(self.size, math.prod(layer.shape) * count * (self.dimension + VERTICES))
        step = Branch(
            layer,
            self.units,
            lambda *arrays: functions(*fill(arrays)),
            lambda decided, *arrays: finish(decided, *fill(arrays)),
            tuple(node.number for node in nodes),
            (output.number,),
        )
        self.steps.append(step)
        self.units += math.prod(layer.shape)
        return [output]

    def filler(self, operands):
        """A function of the arrays of the nodes among operands: all of them as affine values."""
        fixed = [
            None
            if isinstance(a, Node)
            else lifted(np.asarray(a, float)[None, None], self.dimension)
            for a in operands
        ]

        def fill(arrays):
            rest = iter(arrays)
            return [lifted(next(rest), self.dimension) if a is None else a for a in fixed]

        return fill

    def move(self, eqn, inputs):
        """A step that moves elements, by what it makes of their numbers."""
        start, numbers, moved = 0, [], []
        for v, value in zip(eqn.invars, inputs, strict=True):
            if floating(v.aval.dtype) or v.aval.dtype == bool:
                count = math.prod(v.aval.shape)
                moved.append(value)
                value = np.arange(start, start + count).reshape(v.aval.shape)
                start += count
            elif isinstance(value, Node):
                raise self.error(eqn.primitive.name, "has indices that depend on the input")
            numbers.append(value)
        places = compute(eqn, numbers)
        if any(np.any(place < 0) or np.any(place >= start) for place in places):
            raise self.error(eqn.primitive.name, "takes elements that are not there")
        nodes = [a for a in moved if isinstance(a, Node)]
        shapes = [place.shape for place in places]
        if len(moved) == 1:
            return self.add(lambda a: [_take([a], place) for place in places], nodes, *shapes)
        fill = self.filler(moved)
        run = lambda *arrays: [_take(fill(arrays), place) for place in places]
        return self.add(run, nodes, *shapes, size=start, flat=False)

    def scan(self, eqn, inputs, used):
        """The steps of each turn of `lax.scan`."""
        body, own = _called(eqn.params["jaxpr"])
        longer = lambda outer, inner: len(outer.aval.shape) > len(inner.aval.shape)
        stacked = sum(map(longer, eqn.invars, body.invars[-len(inputs) :]))
        carries = len(used) - sum(map(longer, eqn.outvars, body.outvars))
        fixed = inputs[: len(inputs) - stacked - carries]
        carry, stacks = inputs[len(fixed) : len(fixed) + carries], inputs[len(fixed) + carries :]
        rows = {}
        for i in range(eqn.params["length"])[:: -1 if eqn.params["reverse"] else 1]:
            parts = [self.row(a, i) for a in stacks]
            wanted = [True] * carries + used[carries:]
            results = self.walk(body, [*own, *fixed, *carry, *parts], wanted)
            carry, rows[i] = results[:carries], results[carries:]
        columns = [[rows[i][k] for i in sorted(rows)] for k in range(len(used) - carries)]
        return [*carry, *(None if column[0] is None else self.stack(column) for column in columns)]

    def row(self, a, i):
        if not isinstance(a, Node):
            return a[i]
        return self.add(lambda x: [x[:, :, i]], [a], a.shape[1:])[0]

    def stack(self, column):
        if not any(isinstance(a, Node) for a in column):
            return np.stack(column)
        together = lambda *arrays: np.stack(np.broadcast_arrays(*arrays), axis=2)
        return self.affine(together, column, (len(column), *column[0].shape))[0]


VERTICES = 8  # about as many as a polygon has


def _called(program):
    """A traced program inside of another one, and its constants."""
    return getattr(program, "jaxpr", program), list(map(constant, getattr(program, "consts", ())))


def _take(arrays, place):
    """Elements at the numbers `place`, of arrays [cells, coefficients, ...] one after the other."""
    cells = max(map(len, arrays))
    flat = [np.broadcast_to(a, (cells, *a.shape[1:])) for a in arrays]
    flat = [a.reshape(cells, a.shape[1], -1) for a in flat]
    whole = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=2)
    order = place.ravel()
    if order.size != whole.shape[2] or np.any(order != np.arange(order.size)):
        whole = np.take(whole, order, axis=2)
    return whole.reshape(*whole.shape[:2], *place.shape)
