"""The modules of a Flax model as it calls them, for Linen and NNX alike."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.typing import PathParts

import normjax.linen
import normjax.nnx
from normjax.paths import arrays_of

__all__ = ["Visit", "intercept", "norms", "visit"]


class Visit(NamedTuple):
    """A call of a module: what it was called with and what it returned, without values.

    Arrays are tracers of an abstract run. They tell shapes and dtypes, and by identity which module
    takes what another one returned.

    Example:
      >>> import jax, flax.linen as nn, normjax.modules as modules
      >>> model, x = nn.Sequential([nn.Dense(5), nn.Dense(3)]), jax.numpy.ones((2, 4))
      >>> _, first, second = modules.visit(model, model.init(jax.random.key(0), x), x)
      >>> second.path, second.args[0] is first.output
      (('layers_1',), True)
    """

    path: PathParts
    module: Any  # Linen: with its fields, unbound; NNX: the one of the model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def visit(model: linen.Module | nnx.Module, *args: Any, **kwargs: Any) -> list[Visit]:
    """The calls of a model's modules, in the order in which they begin: the model's own is first.

    A Linen model takes what `model.apply` does, the variables first. Arrays may be
    `jax.ShapeDtypeStruct`s: nothing is computed, and the model and its variables stay as they are.
    What `scan` and other transforms trace several times is there as often. TypeError for what is no
    Flax module, or no variables in Linen.

    Example:
      >>> import jax, normjax.nnx, normjax.modules as modules
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), normjax.nnx.LayerNorm(5, rngs=rngs))
      >>> calls = modules.visit(model, jax.ShapeDtypeStruct((2, 4), "float32"))
      >>> [(call.path, type(call.module).__name__, call.output.shape) for call in calls[1:]]
      [(('layers', 0), 'Linear', (2, 5)), (('layers', 1), 'LayerNorm', (2, 5))]
    """
    calls = []

    def note(path, module, call, args, kwargs):
        place = len(calls)
        calls.append(None)
        output = call(*args, **kwargs)
        calls[place] = Visit(path, module, args, kwargs, output)
        return output

    run, *inputs = intercept(model, note, *args, **kwargs)
    jax.eval_shape(run, *jax.tree.map(_shape, inputs))
    return calls


def _shape(a):
    """An array without its numbers, and without its place on a mesh, which says nothing here."""
    return jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a))


def intercept(
    model: linen.Module | nnx.Module, around: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """A model as a function whose modules are all called by `around`, for a trace of JAX.

    Returns `run`, `variables` and `arrays`. `run(variables, arrays)` calls the model with `args`
    and `kwargs`, which are those of `visit`, and returns the arrays of its output; `variables` are
    those of the model. In it `around(path, module, call, args, kwargs)` takes the place of each
    call of a module, with path and module as in `Visit`; it returns what `call(*args, **kwargs)`
    does, or something else. The model stays as it is.

    Example:
      >>> import jax, flax.linen as nn, normjax.modules as modules
      >>> model, x = nn.Sequential([nn.Dense(5), nn.relu]), jax.numpy.ones((2, 4))
      >>> half = lambda path, module, call, args, kwargs: call(*args, **kwargs) / 2
      >>> run, *inputs = modules.intercept(model, half, model.init(jax.random.key(0), x), x)
      >>> [y.shape for y in jax.eval_shape(run, *inputs)]
      [(2, 5)]
    """
    if isinstance(model, nnx.Module):
        return _intercept_nnx(model, around, args, kwargs)
    if not isinstance(model, linen.Module):
        raise TypeError(f"modules: {model!r} is not a module of flax.linen or flax.nnx.")
    if not args or not isinstance(args[0], Mapping):
        raise TypeError("modules: a Linen module needs its variables as the first argument.")
    return _intercept_linen(model, around, args[0], args[1:], kwargs)


def norms(model: linen.Module | nnx.Module, *args: Any, **kwargs: Any) -> dict[PathParts, Any]:
    """The methods of a model's norms by path, in the order of their first call.

    Linen models need the arguments of `visit`. Those of NNX have their norms without a call; they
    come in the order of `nnx.iter_modules`.

    Example:
      >>> import jax, flax.linen as nn, normjax.linen, normjax.modules as modules
      >>> model, x = nn.Sequential([nn.Dense(5), normjax.linen.RMSNorm()]), jax.numpy.ones((2, 4))
      >>> modules.norms(model, model.init(jax.random.key(0), x), x)[("layers_1",)].epsilon
      1e-06
    """
    if isinstance(model, nnx.Module):
        every = [(path, module) for path, module in nnx.iter_modules(model)]
        return {path: m.method for path, m in every if isinstance(m, normjax.nnx.Norm)}
    calls = visit(model, *args, **kwargs)
    return {
        call.path: call.module.method_of()
        for call in calls
        if isinstance(call.module, normjax.linen.Front)
    }


def _intercept_linen(model, around, variables, args, kwargs):
    arrays, given = arrays_of((args, kwargs))

    def intercepted(call, args, kwargs, context):
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        module = context.module
        return around(module.path, module.clone(parent=None), call, args, kwargs)

    def run(variables, arrays):
        args, kwargs = given(arrays)
        mutable = kwargs.pop("mutable", [name for name in variables if name != "params"])
        with linen.intercept_methods(intercepted):
            output = model.apply(variables, *args, **kwargs, mutable=mutable)
        output = output if mutable is False else output[0]
        return list(arrays_of(output)[0].values())

    return run, variables, arrays


def _intercept_nnx(model, around, args, kwargs):
    arrays, given = arrays_of((args, kwargs))
    own = dict(nnx.iter_modules(model))
    structure, state = nnx.split(model)

    def run(state, arrays):
        copy = nnx.merge(structure, state)
        for path, module in list(nnx.iter_modules(copy)):
            object.__setattr__(module, "__class__", _intercepted(type(module)))
            object.__setattr__(module, "_around", functools.partial(around, path, own[path]))
        args, kwargs = given(arrays)
        return list(arrays_of(copy(*args, **kwargs))[0].values())

    return run, state, arrays


@functools.cache
def _intercepted(kind):
    """A subclass whose instances give their calls to `_around`."""

    class Intercepted(kind):
        def __call__(self, *args, **kwargs):
            return self._around(super().__call__, args, kwargs)

    return Intercepted
