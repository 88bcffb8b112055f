"""What each primitive of JAX does to values that are affine on cells: steps, branches, or neither.

A rule takes the program, the step of the trace, and its inputs, nodes or constants. It adds what it
needs to the program and returns the outputs.
"""

import math
import operator
from typing import Any

import jax
import numpy as np

from normjax.analysis.geometry.values import Layer, Node, floating

# Steps that only move or repeat elements.
MOVES = {
    *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "rev", "pad"),
    *("slice", "dynamic_slice", "dynamic_update_slice", "gather"),
    *("concatenate", "split", "stack", "unstack"),
}
# Where the programs are that these steps call.
CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2"), "jaxpr"),
    **dict.fromkeys(("closed_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}


def _same(program, eqn, *inputs):
    return list(inputs)


def _convert(program, eqn, a):
    new = eqn.params["new_dtype"]
    if floating(new) and not a.flat:
        return [a]
    if not a.flat:
        raise program.error("convert_element_type", f"to {new} is not piecewise affine")
    dtype = float if floating(new) else new
    return program.add(lambda x: [x.astype(dtype)], [a], a.shape)


def _shape(eqn):
    return eqn.outvars[0].aval.shape


def _fit(eqn, inputs):
    """Inputs of an elementwise step, constants in the shape of the output.

    Axes of nodes may have the size 1 where those of the output are larger.
    """
    shape = _shape(eqn)
    return [a if isinstance(a, Node) else np.broadcast_to(a, shape) for a in inputs]


def _sum(combine):
    def rule(program, eqn, *inputs):
        return program.affine(combine, _fit(eqn, inputs), _shape(eqn))

    return rule


def _negative(program, eqn, a):
    return program.add(lambda x: [-x], [a], a.shape)


def _times(program, eqn, a, b):
    a, b = (a, b) if isinstance(a, Node) else (b, a)
    if not isinstance(b, Node):
        return program.add(lambda x: [x * b], [a], _shape(eqn))
    if not (a.flat or b.flat):
        raise program.error("mul", "of two values that depend on the input is not piecewise affine")
    return program.add(lambda x, y: [x * y], [a, b], _shape(eqn))


def _over(program, eqn, a, b):
    if isinstance(b, Node):
        raise program.error("div", "by a value that depends on the input is not piecewise affine")
    return program.add(lambda x: [x / b], [a], _shape(eqn))


def _logical(function):
    def rule(program, eqn, *inputs):
        if eqn.outvars[0].aval.dtype != bool:
            raise program.error(eqn.primitive.name)
        nodes = [a for a in inputs if isinstance(a, Node)]
        rest = [a for a in inputs if not isinstance(a, Node)]
        return program.add(lambda *x: [function(*x, *rest)], nodes, _shape(eqn))

    return rule


def _select(program, eqn, which, *cases):
    if not isinstance(which, Node) and which.ndim == 0:
        return [cases[int(which)]]
    if not floating(eqn.outvars[0].aval.dtype):
        raise program.error("select_n", "of values that are not floating is not supported")
    shape = _shape(eqn)

    def choose(which, *cases):
        which = which.reshape(*which.shape, *(1,) * (cases[0].ndim - which.ndim))
        result = cases[0]
        for i, case in enumerate(cases[1:], 1):
            result = np.where(which == i, case, result)
        return result

    cases = _fit(eqn, cases)
    if not isinstance(which, Node):
        return program.affine(lambda *x: choose(which[None, None], *x), cases, shape)
    fill, nodes = program.filler(cases), [a for a in cases if isinstance(a, Node)]
    run = lambda which, *arrays: [choose(which, *fill(arrays))]
    return program.add(run, [which, *nodes], shape, flat=False)


def _reduce_sum(program, eqn, a):
    axes = tuple(axis + 2 for axis in eqn.params["axes"])
    return program.add(lambda x: [x.sum(axes)], [a], _shape(eqn))


def _cumsum(program, eqn, a):
    axis, turn = eqn.params["axis"] + 2, -1 if eqn.params["reverse"] else 1
    flip = lambda x: np.flip(x, axis) if turn < 0 else x
    return program.add(lambda x: [flip(flip(x).cumsum(axis))], [a], a.shape)


def _dot(program, eqn, a, b):
    if isinstance(a, Node) and isinstance(b, Node):
        raise program.error("dot_general", "of two values that depend on the input")
    (left, right), (batch, batch_right) = eqn.params["dimension_numbers"]
    first = isinstance(a, Node)
    if not first:
        a, b, left, right, batch, batch_right = b, a, right, left, batch_right, batch
    free = [axis for axis in range(len(a.shape)) if axis not in (*left, *batch)]
    rest = [axis for axis in range(b.ndim) if axis not in (*right, *batch_right)]
    # Matrices for each element of the batch: [free, summed] of the node, [summed, rest].
    matrices = b.transpose(*batch_right, *right, *rest)
    sizes = [[n.shape[axis] for axis in axes] for n, axes in ((a, batch), (a, free), (b, rest))]
    many, rows, columns = map(math.prod, sizes)
    matrices = matrices.reshape(many, -1, columns)
    order = [0, 1, *(2 + axis for axis in (*batch, *free, *left))]
    shape = _shape(eqn)

    def run(x):
        cells = x.shape[:2]
        x = x.transpose(order).reshape(*cells, many, rows, -1)
        if many == 1:
            y = x.reshape(-1, x.shape[-1]) @ matrices[0]
        else:
            y = x @ matrices
        y = y.reshape(*cells, many, rows, columns)
        return [(y if first else y.swapaxes(3, 4)).reshape(*cells, *shape)]

    return program.add(run, [a], shape)


def _windows(numbers, sizes, strides, padding, base_dilation, window_dilation):
    """The numbers in windows over the last axes: [*other axes, *positions, *sizes], -1: padding."""
    first = numbers.ndim - len(sizes)
    gaps = [(0, 0, 0)] * first
    gaps += [(*ends, n - 1) for ends, n in zip(padding, base_dilation, strict=True)]
    numbers = np.asarray(jax.lax.pad(numbers, np.int64(-1), gaps))
    reach = [(n - 1) * gap + 1 for n, gap in zip(sizes, window_dilation, strict=True)]
    axes = tuple(range(first, numbers.ndim))
    views = np.lib.stride_tricks.sliding_window_view(numbers, reach, axes)
    steps = (slice(None, None, n) for n in (*strides, *window_dilation))
    return views[(*(slice(None),) * first, *steps)]


def _flat(x):
    """An array [cells, coefficients, elements], with a zero at the end, for places that are -1."""
    x = x.reshape(*x.shape[:2], -1)
    return np.concatenate([x, np.zeros_like(x[:, :, :1])], axis=2)


def _conv(program, eqn, a, b):
    params, groups = eqn.params, eqn.params["feature_group_count"]
    if isinstance(b, Node) or params["batch_group_count"] != 1:
        raise program.error("conv_general_dilated", "of two values that depend on the input")
    left, right, out = (
        (n, *rest, c) for n, c, *rest in params["dimension_numbers"]
    )  # last: channels
    kernel = np.moveaxis(np.transpose(b, right), 0, -1)  # *sizes, inputs of a group, outputs
    *sizes, width, outputs = kernel.shape
    spacing = (params[key] for key in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
    shape = [a.shape[axis] for axis in left[:-1]]
    places = _windows(np.arange(math.prod(shape)).reshape(shape), sizes, *spacing)
    shape, places = places.shape[: len(shape)], places.reshape(-1, math.prod(sizes))
    kernel = kernel.reshape(-1, groups, outputs // groups).swapaxes(0, 1)
    order = [0, 1, *(2 + axis for axis in left)]
    back = [0, 1, *(2 + np.argsort(out))]

    def run(x):
        x = x.transpose(order).reshape(*x.shape[:2], -1, groups * width)
        x = np.concatenate([x, np.zeros_like(x[:, :, :1])], axis=2)  # at -1, the padding
        x = np.take(x, places, axis=2)
        x = x.reshape(*x.shape[:-1], groups, width).transpose(0, 1, 4, 2, 3, 5)
        y = x.reshape(*x.shape[:4], -1) @ kernel
        return [y.swapaxes(2, 3).reshape(*y.shape[:2], *shape, outputs).transpose(back)]

    size = places.size * groups * width
    return program.add(run, [a], _shape(eqn), size=size)


def _pool(eqn, a):
    """The numbers of the elements in each window of a pool: [*output, *sizes]."""
    keys = "window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"
    numbers = np.arange(math.prod(a.shape)).reshape(a.shape)
    places = _windows(numbers, *(eqn.params[key] for key in keys))
    return places.reshape(*places.shape[: len(a.shape)], -1)


def _pool_sum(program, eqn, a):
    places = _pool(eqn, a)
    run = lambda x: [np.take(_flat(x), places, axis=2).sum(-1)]
    return program.add(run, [a], _shape(eqn), size=places.size)


# Branches.


def _compete(program, name, shape, pair, finish, flat=False):
    """A branch on which of two values is larger: `finish` takes that the first is, and both."""

    def functions(x, y):
        size = np.abs(x).sum(1) + np.abs(y).sum(1)
        cells = len(size)
        return (x - y).reshape(cells, x.shape[1], -1, 1), size.reshape(cells, -1)

    def finished(decided, x, y):
        return finish((decided > 0).reshape(-1, 1, *shape), x, y)

    return program.branch(Layer(name, shape), shape, functions, finished, pair, flat=flat)


def _largest(program, eqn, a, b):
    return _compete(program, "max", _shape(eqn), _fit(eqn, (a, b)), np.where)


def _least(more, x, y):
    return np.where(more, y, x)


def _smallest(program, eqn, a, b):
    return _compete(program, "min", _shape(eqn), _fit(eqn, (a, b)), _least)


def _clamp(program, eqn, low, a, high):
    low, a, high = _fit(eqn, (low, a, high))
    (a,) = _compete(program, "clamp", a.shape, [a, low], np.where)
    return _compete(program, "clamp", a.shape, [a, high], _least)


def _compare(sign):
    def rule(program, eqn, *inputs):
        if not all(floating(v.aval.dtype) for v in eqn.invars):
            raise program.error(eqn.primitive.name)
        finish = lambda more, x, y: more == sign
        return _compete(
            program, eqn.primitive.name, _shape(eqn), _fit(eqn, inputs), finish, flat=True
        )

    return rule


def _absolute(program, eqn, a):
    finish = lambda more, x, y: np.where(more, x, -x)
    return _compete(program, "abs", a.shape, [a, np.zeros(a.shape)], finish)


def _sign(program, eqn, a):
    finish = lambda more, x, y: np.where(more, 1.0, -1.0)
    return _compete(program, "sign", a.shape, [a, np.zeros(a.shape)], finish, flat=True)


def _winner(program, name, a, places, sign=1):
    """A branch on the largest (sign 1) or smallest of elements: places [*output, elements]."""
    shape, count = places.shape[:-1], places.shape[-1]
    first = np.take_along_axis(places, (places >= 0).argmax(-1)[..., None], -1)
    if np.any(first < 0):
        raise program.error(name, "has a window without any element")
    rows = np.where(places < 0, first, places).reshape(-1, count)

    def functions(x):
        x = sign * x.reshape(*x.shape[:2], -1)
        return x[:, :, rows], np.abs(x).sum(1)[:, rows].max(-1)

    def finish(decided, x):
        x = x.reshape(*x.shape[:2], -1)
        which = np.broadcast_to(rows, (len(x), *rows.shape))
        which = np.take_along_axis(which, decided[..., None], 2)[:, None, :, 0]
        return np.take_along_axis(x, which, 2).reshape(*x.shape[:2], *shape)

    return program.branch(Layer(name, shape), shape, functions, finish, [a], count=count)


def _reduce(sign):
    def rule(program, eqn, a):
        axes, rank = eqn.params["axes"], len(a.shape)
        numbers = np.arange(math.prod(a.shape)).reshape(a.shape)
        order = [i for i in range(rank) if i not in axes]
        places = numbers.transpose(*order, *axes)
        places = places.reshape(*places.shape[: len(order)], -1)
        return _winner(program, eqn.primitive.name, a, places, sign)

    return rule


def _pool_max(program, eqn, a):
    return _winner(program, eqn.primitive.name, a, _pool(eqn, a))


RULES: dict[str, Any] = {
    **dict.fromkeys(("copy", "copy_p", "name", "optimization_barrier"), _same),
    **dict.fromkeys(("stop_gradient", "reduce_precision", "sharding_constraint"), _same),
    "convert_element_type": _convert,
    "add": _sum(operator.add),
    "add_any": _sum(operator.add),
    "sub": _sum(operator.sub),
    "neg": _negative,
    "mul": _times,
    "div": _over,
    "and": _logical(np.logical_and),
    "or": _logical(np.logical_or),
    "xor": _logical(np.logical_xor),
    "not": _logical(np.logical_not),
    "select_n": _select,
    "reduce_sum": _reduce_sum,
    "reduce_window_sum": _pool_sum,
    "cumsum": _cumsum,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "max": _largest,
    "min": _smallest,
    "clamp": _clamp,
    **dict.fromkeys(("gt", "ge"), _compare(True)),
    **dict.fromkeys(("lt", "le"), _compare(False)),
    "abs": _absolute,
    "sign": _sign,
    "reduce_max": _reduce(1),
    "reduce_min": _reduce(-1),
    "reduce_window_max": _pool_max,
}
