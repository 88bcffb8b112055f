"""The modules of a Flax model as it calls them, for Linen and NNX alike."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from flax.typing import PathParts

import normjax.linen
import normjax.nnx

__all__ = ["Visit", "norms", "visit"]


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
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: a for i, a in enumerate(leaves) if hasattr(a, "shape") and hasattr(a, "dtype")}

    def given(arrays):
        return structure.unflatten(arrays.get(i, leaf) for i, leaf in enumerate(leaves))

    if isinstance(model, nnx.Module):
        return _visit_nnx(model, given, arrays)
    if not isinstance(model, linen.Module):
        raise TypeError(f"visit: {model!r} is not a module of flax.linen or flax.nnx.")
    if not args or not isinstance(args[0], Mapping):
        raise TypeError("visit: a Linen module needs its variables as the first argument.")
    return _visit_linen(model, given, arrays)


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


def _visit_linen(model, given, arrays):
    calls = []

    def record(call, args, kwargs, context):
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        place = len(calls)
        calls.append(None)
        output = call(*args, **kwargs)
        module = context.module
        calls[place] = Visit(module.path, module.clone(parent=None), args, kwargs, output)
        return output

    def run(arrays):
        args, kwargs = given(arrays)
        variables = args[0]
        mutable = kwargs.pop("mutable", [name for name in variables if name != "params"])
        with linen.intercept_methods(record):
            return model.apply(*args, **kwargs, mutable=mutable)

    jax.eval_shape(run, arrays)
    return calls


def _visit_nnx(model, given, arrays):
    calls = []
    own = dict(nnx.iter_modules(model))
    structure, state = nnx.split(model)

    def note(path, call, args, kwargs):
        place = len(calls)
        calls.append(None)
        output = call(*args, **kwargs)
        calls[place] = Visit(path, own[path], args, kwargs, output)
        return output

    def run(state, arrays):
        copy = nnx.merge(structure, state)
        for path, module in list(nnx.iter_modules(copy)):
            object.__setattr__(module, "__class__", _noting(type(module)))
            object.__setattr__(module, "_note_call", functools.partial(note, path))
        args, kwargs = given(arrays)
        copy(*args, **kwargs)

    jax.eval_shape(run, state, arrays)
    return calls


@functools.cache
def _noting(kind):
    """A subclass whose instances note their calls."""

    class Noting(kind):
        def __call__(self, *args, **kwargs):
            return self._note_call(super().__call__, args, kwargs)

    return Noting
