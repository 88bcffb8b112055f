"""Values of a program: constants, and nodes that stand for arrays which depend on the input.

On cells, pieces of a line or plane with `dimension` coordinates, a node is an array
[cells, dimension + 1, *shape]: its slopes, and last its value where the coordinates are zero. A
flat node does not vary within a cell and is an array [cells, 1, *shape], of any dtype.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax.core.compat import evaluate


class Node(NamedTuple):
    """A value that depends on the input."""

    number: int
    shape: tuple[int, ...]
    flat: bool = False


class Layer(NamedTuple):
    """A nonlinear step of a function: the name of its primitive in JAX, the shape of its units.

    Example:
      >>> import jax, normjax.analysis.geometry as geometry
      >>> geometry.regions_on_segment(jax.nn.relu, [-1.0, 2.0], [1.0, 3.0]).layers
      (Layer(name='max', shape=(2,)),)
    """

    name: str
    shape: tuple[int, ...]


def lifted(a: np.ndarray, dimension: int) -> np.ndarray:
    """The array of a node as that of one that is not flat."""
    if a.shape[1] == dimension + 1:
        return a
    zeros = np.zeros((len(a), dimension, *a.shape[2:]))
    return np.concatenate([zeros, a.astype(float)], axis=1)


def floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def constant(value: Any) -> Any:
    """A value that does not depend on the input; floating ones in float64."""
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended):  # keys of random numbers
        return value
    array = np.asarray(value)
    return array.astype(float) if floating(array.dtype) else array


def compute(eqn: Any, inputs: list[Any]) -> list[Any]:
    """The results of a step of a traced program for constants, in float64."""
    plain = PLAIN.get(eqn.primitive.name)
    if plain is not None and all(isinstance(value, np.ndarray) for value in inputs):
        return [plain(eqn.params, *inputs)]
    wide = lambda v: np.dtype(float) if isinstance(v, np.dtype) and floating(v) else v
    params = {key: wide(value) for key, value in eqn.params.items()}
    return list(map(constant, evaluate(eqn.primitive, params, *map(jnp.asarray, inputs))))


def _broadcast(params, a):
    shape = np.ones(len(params["shape"]), int)
    shape[list(params["broadcast_dimensions"])] = a.shape
    return np.broadcast_to(a.reshape(shape), params["shape"])


# Of frequent steps, for which JAX would compile a program for each shape.
PLAIN = {
    "reshape": lambda params, a: a.reshape(params["new_sizes"]),
    "squeeze": lambda params, a: a.squeeze(params["dimensions"]),
    "transpose": lambda params, a: a.transpose(params["permutation"]),
    "broadcast_in_dim": _broadcast,
    "add": lambda params, a, b: a + b,
    "sub": lambda params, a, b: a - b,
    "mul": lambda params, a, b: a * b,
    "sqrt": lambda params, a: np.sqrt(a),
    "rsqrt": lambda params, a: 1 / np.sqrt(a),
}


def needed(program: Any, wanted: list[bool]) -> list[tuple[Any, list[bool]]]:
    """The steps that the `wanted` results of a traced program need, and which results of theirs."""
    live = {v for v, use in zip(program.outvars, wanted, strict=True) if use and is_variable(v)}
    found = []
    for eqn in reversed(program.eqns):
        used = [v in live for v in eqn.outvars]
        if any(used):
            found.append((eqn, used))
            live |= set(filter(is_variable, eqn.invars))
    return found[::-1]


def is_variable(v: Any) -> bool:
    """Whether an operand of a traced program is a variable, and no literal."""
    return not hasattr(v, "val")
