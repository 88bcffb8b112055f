"""What the modules of a Flax model take and return, seen from outside."""

import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

CALL, INPUT = "__call__", "__input__"
ARRAYS = jax.Array | np.ndarray


def capture(
    model: linen.Module | nnx.Module, *args: Any, **kwargs: Any
) -> OrderedDict[str, jax.Array]:
    """Runs a model once and returns what its modules return from `__call__` and what they sow.

    They sow by `self.sow("intermediates", name, value)`, in NNX `self.sow(nnx.Intermediate, ...)`.
    A Linen model takes what `model.apply` does, the variables first (all of them but parameters are
    mutable). Works under `jax.jit` and `nnx.jit`. The model and its variables stay as they were,
    also in training mode. TypeError for what is no Flax module, or no variables in Linen.

    Returns the real floating arrays of rank 2 and more in the order in which they were computed.
    "block/conv" is the output of a module, "block/sum" a value sown as "sum" by the module "block",
    "__call__" the output of the model; "block/conv#2" is of a second call, "lstm[0]" a part of an
    output that is not one array. Maps of layers that `scan` runs are stacked, if the scan lets them
    through. In Linen, what a module has sown before it calls one made by `nn.remat`, `nn.jit` or
    `nn.scan` comes after the maps of that call.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, normjax.analysis.layers as layers
      >>> model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)]), jnp.ones((2, 4))
      >>> maps = layers.capture(model, model.init(jax.random.key(0), x), x)
      >>> {name: y.shape for name, y in maps.items()}
      {'layers_0': (2, 5), 'layers_2': (2, 3), '__call__': (2, 3)}
    """
    return _run("capture", model, args, kwargs, inputs=False)


def capture_inputs(
    model: linen.Module | nnx.Module, *args: Any, **kwargs: Any
) -> OrderedDict[str, jax.Array]:
    """Runs a model once and returns what its modules are called with: the first argument of each.

    As `capture`, by the path of the module; a module whose input is no real floating array of rank
    2 and more, or is given by name, is left out. "__call__" is the input of the model.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, normjax.analysis.layers as layers
      >>> model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)]), jnp.ones((2, 4))
      >>> inputs = layers.capture_inputs(model, model.init(jax.random.key(0), x), x)
      >>> {name: x.shape for name, x in inputs.items()}
      {'__call__': (2, 4), 'layers_0': (2, 4), 'layers_2': (2, 5)}
    """
    return _run("capture_inputs", model, args, kwargs, inputs=True)


def _run(caller, model, args, kwargs, inputs):
    if isinstance(model, nnx.Module):
        found, log = _run_nnx(model, args, kwargs)
    elif not isinstance(model, linen.Module):
        raise TypeError(f"{caller}: {model!r} is not a module of flax.linen or flax.nnx.")
    elif not args or not isinstance(args[0], Mapping):
        raise TypeError(f"{caller}: a Linen module needs its variables as the first argument.")
    else:
        found, log = _run_linen(model, args, kwargs)
    place = {entry: i for i, entry in enumerate(log)}
    entries = [entry for entry in _stored(found) if inputs == (entry[0][1] == INPUT)]
    entries.sort(key=lambda entry: place.get(entry[0], len(place)))
    maps = OrderedDict()
    for (path, name, i), value in entries:
        parts = path or (CALL,) if name in (CALL, INPUT) else (*path, name)
        label = "/".join(map(str, parts)) + (f"#{i + 1}" if i else "")
        for inner, leaf in jax.tree_util.tree_leaves_with_path(value):
            if getattr(leaf, "ndim", 0) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
                maps[label + jax.tree_util.keystr(inner)] = leaf
    return maps


# Flax stores values by path. The order of calls is noted apart from them, in a log of (path, name,
# how many of these before), which stays valid when a transform inside the model traces the values.


def _stored(found, path=()):
    """Entries of the log and their values, of what Flax has stored: a tree of tuples."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _stored(value, (*path, name))
        else:
            values = value if isinstance(value, tuple) else (value,)
            yield from (((path, name, i), each) for i, each in enumerate(values))


def _run_linen(model, args, kwargs):
    variables = {name: tree for name, tree in args[0].items() if name != "intermediates"}
    log = {}

    def keep(module, name, value):
        before = module.variables.get("intermediates", {}).get(name, ())
        if module.sow("intermediates", name, value):
            log[module.path, name, len(before)] = None

    def record(call, args, kwargs, context):
        module, called = context.module, context.method_name == CALL
        if called and args and isinstance(args[0], ARRAYS):
            keep(module, INPUT, args[0])
        y = call(*args, **kwargs)
        root = module.scope.root
        every = _stored(root.variables().get("intermediates", {}), root.path)
        log.update(dict.fromkeys(entry for entry, _ in every))
        if called:
            keep(module, CALL, y)
        return y

    mutable = [*(variables.keys() - {"params"}), "intermediates"]
    with linen.intercept_methods(record):
        _, updates = model.apply(variables, *args[1:], **kwargs, mutable=mutable)
    return updates.get("intermediates", {}), log


def _run_nnx(model, args, kwargs):
    model = nnx.clone(model)
    log = {}

    def note(path, name):
        log[path, name, sum(entry[:2] == (path, name) for entry in log)] = None

    modules: dict[Any, Any] = dict(nnx.iter_modules(model))
    for path, module in modules.items():
        object.__setattr__(module, "__class__", _recording(type(module)))
        module._note_sown = functools.partial(note, path)
    _, found = nnx.capture(lambda model: model(*args, **kwargs), nnx.Intermediate)(model)
    return nnx.to_pure_dict(found), log


@functools.cache
def _recording(kind):
    """A subclass whose instances sow what they take and return, and note what they sow."""

    class Recording(kind):
        def __call__(self, *args, **kwargs):
            if args and isinstance(args[0], ARRAYS):
                self.sow(nnx.Intermediate, INPUT, args[0])
            y = super().__call__(*args, **kwargs)
            self.sow(nnx.Intermediate, CALL, y)
            return y

        def sow(self, variable_type, name, *args, **kwargs):
            self._note_sown(name)
            return super().sow(variable_type, name, *args, **kwargs)

    return Recording


__all__ = ["capture", "capture_inputs"]
