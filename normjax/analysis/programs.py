"""The program that JAX makes of a Flax model, as a flat list of steps that can be run in parts."""

import functools
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.typing import PathParts
from jax.ad_checkpoint import checkpoint_name

from normjax import modules

MARK = "normjax.analysis.programs"
INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")


class Step(NamedTuple):
    """An operation of a program; its operands and results are values by number.

    Example:
      >>> from normjax.analysis import programs
      >>> programs.Step("neg", lambda x: [-x], (0,), (1,)).run(2.0)
      [-2.0]
    """

    kind: str  # the name of JAX's primitive
    run: Callable[..., list[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Site(NamedTuple):
    """A call of a module: its path, and the steps at which it begins and ends.

    Example:
      >>> from normjax.analysis import programs
      >>> programs.Site(("conv",), 3, 5).path
      ('conv',)
    """

    path: PathParts
    start: int
    stop: int  # 0 if the call returns no array


class Program(NamedTuple):
    """Steps in order, what is known before them, the numbers of the inputs, and types of values.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn, normjax.analysis.programs as programs
      >>> model, x = nn.Dense(2), jnp.ones((3, 4))
      >>> program = programs.trace(model, model.init(jax.random.key(0), x), x)
      >>> program.types[program.inputs[0]].shape, [site.path for site in program.sites]
      ((3, 4), [()])
    """

    steps: list[Step]
    known: dict[int, Any]  # variables, constants and inputs
    inputs: list[int]  # the arrays that the model is called with
    types: dict[int, Any]
    sites: list[Site]  # in the order in which calls begin


def trace(model: linen.Module | nnx.Module, *args: Any, **kwargs: Any) -> Program:
    """The program of a call of a model, which takes what `layers.calls` does.

    What `jit` and `remat` hold is in its place, and what `scan` repeats is there as often; a
    `while` and a `cond` are one step. The model stays as it is.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn, normjax.analysis.programs as programs
      >>> model, x = nn.Sequential([nn.Dense(2), nn.relu]), jnp.ones((3, 4))
      >>> program = programs.trace(model, model.init(jax.random.key(0), x), x)
      >>> "dot_general" in [step.kind for step in program.steps]
      True
    """
    paths = []

    def mark(path, module, call, args, kwargs):
        i = len(paths)
        paths.append(path)
        args, kwargs = _marked((args, kwargs), f"{MARK} {i} starts")
        return _marked(call(*args, **kwargs), f"{MARK} {i} stops")

    run, variables, arrays = modules.intercept(model, mark, *args, **kwargs)
    with jax.disable_jit():  # which unrolls `scan`
        closed = jax.make_jaxpr(run)(variables, arrays)
    program = Program([], {}, [], {}, [])
    values = [*jax.tree.leaves(variables), *jax.tree.leaves(arrays)]
    numbers = [_new(program, v.aval) for v in closed.jaxpr.invars]
    program.known.update(zip(numbers, values, strict=True))
    program.inputs.extend(numbers[len(jax.tree.leaves(variables)) :])
    marks = []
    _inline(program, marks, closed.jaxpr, closed.consts, numbers)
    program.sites.extend(_sites(marks, paths))
    return program


def run(steps: Iterable[Step], values: MutableMapping[int, Any]) -> None:
    """Runs steps one after another on `values` by number, to which it adds the results.

    Example:
      >>> from normjax.analysis import programs
      >>> values = {0: 2.0}
      >>> programs.run([programs.Step("neg", lambda x: [-x], (0,), (1,))], values)
      >>> values[1]
      -2.0
    """
    for step in steps:
        results = step.run(*(values[i] for i in step.inputs))
        values.update(zip(step.outputs, results, strict=True))


def _marked(tree, name):
    number = lambda a: isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.number)
    return jax.tree.map(lambda a: checkpoint_name(a, name) if number(a) else a, tree)


def _sites(marks, paths):
    """The calls of modules, of the steps that mark the arrays that go in and come out."""
    found, last = [], {}
    for place, name in marks:
        *_, i, what = name.split()
        if what == "stops" and i in last:
            found[last[i]] = found[last[i]]._replace(stop=place)
        elif what == "starts" and (i not in last or found[last[i]].stop):
            last[i] = len(found)
            found.append(Site(paths[int(i)], place, 0))
    return found


def _new(program, type):
    program.types[len(program.types)] = type
    return len(program.types) - 1


def _constant(program, value):
    number = _new(program, jax.typeof(value))
    program.known[number] = value
    return number


def _inline(program, marks, jaxpr, consts, numbers):
    """Adds the steps of a program of JAX, whose inputs have `numbers`; returns those of outputs."""
    at = dict(zip(jaxpr.invars, numbers, strict=True))
    at |= {v: _constant(program, c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    read = lambda v: _constant(program, v.val) if hasattr(v, "val") else at[v]
    for eqn in jaxpr.eqns:
        given, kind = [read(v) for v in eqn.invars], eqn.primitive.name
        if kind in INLINED:
            body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = getattr(body, "jaxpr", body), getattr(body, "consts", ())
            results = _inline(program, marks, *inner, given)
        else:
            results = [_new(program, v.aval) for v in eqn.outvars]
            if kind == "name" and str(eqn.params["name"]).startswith(MARK):
                marks.append((len(program.steps), str(eqn.params["name"])))
            bind = functools.partial(_evaluate, eqn.primitive, eqn.params)
            program.steps.append(Step(kind, bind, tuple(given), tuple(results)))
        at.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _evaluate(primitive, params, *operands):
    results = primitive.bind(*operands, **primitive.get_bind_params(params))
    return list(results) if primitive.multiple_results else [results]


__all__ = ["Program", "Site", "Step", "run", "trace"]
