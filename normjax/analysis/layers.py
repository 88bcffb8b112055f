"""What the modules of a Flax model take and return, seen from outside."""

import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

CALL = "__call__"
INPUT = "__input__"
ARRAYS = jax.Array | np.ndarray


def capture(
    model: linen.Module | nnx.Module, *args: Any, **kwargs: Any
) -> OrderedDict[str, jax.Array]:
    """Runs a model once and returns what its modules return from `__call__` and what they sow.

    A value that is no module's output is seen if the model sows it: in Linen with
    `self.sow("intermediates", name, value)`, in NNX with `self.sow(nnx.Intermediate, name, value)`.
    So a residual block that computes `x + y` shows `y`, before the addition, as the output of its
    last submodule, and the sum as its own output; a network that adds between its modules sows
    both.

    Works under `jax.jit` and `nnx.jit`, where maps that are only measured never leave the device.
    The model and its variables stay as they were, also in training mode.

    Args:
      model: a Linen or NNX module.
      *args: for a Linen module what `model.apply` takes, the variables first; all of them but
        parameters are mutable. For an NNX module what `model` takes.
      **kwargs: likewise; for Linen `rngs` and `method`, too.

    Returns:
      The real floating arrays of rank 2 and more in the order in which they were computed. Names
      are paths: "block/conv" is the output of a module, "block/sum" a value sown as "sum" by the
      module "block", "__call__" the output of the model. "block/conv#2" is of a second call,
      "lstm[0]" a part of an output that is not one array. Maps of layers that `scan` runs are
      stacked, if the scan lets them through. In Linen, what a module has sown before it calls one
      made by `nn.remat`, `nn.jit` or `nn.scan` comes after the maps of that call.

    Raises:
      TypeError: if `model` is no Flax module, or a Linen module comes without variables.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from normjax.analysis import layers
      >>> class Block(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         y = nn.Conv(3, (3, 3), name="conv")(x)
      ...         self.sow("intermediates", "sum", x + y)
      ...         return nn.relu(x + y)
      >>> model, x = Block(), jnp.ones((2, 8, 8, 3))
      >>> maps = layers.capture(model, model.init(jax.random.key(0), x), x)
      >>> {name: x.shape for name, x in maps.items()}
      {'conv': (2, 8, 8, 3), 'sum': (2, 8, 8, 3), '__call__': (2, 8, 8, 3)}
    """
    return _run("capture", model, args, kwargs, CALL)


def capture_inputs(
    model: linen.Module | nnx.Module, *args: Any, **kwargs: Any
) -> OrderedDict[str, jax.Array]:
    """Runs a model once and returns what its modules are called with: the first argument of each.

    So a norm shows what it normalizes, even where that is no module's output. Otherwise as
    `capture`; a module whose input is no array, has no second axis or is given by name is left out.

    Args:
      model: a Linen or NNX module.
      *args: as in `capture`.
      **kwargs: as in `capture`.

    Returns:
      The real floating inputs of rank 2 and more by the path of the module, in the order of calls;
      "__call__" is the input of the model.

    Raises:
      TypeError: as in `capture`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from normjax.analysis import layers
      >>> model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)]), jnp.ones((2, 4))
      >>> inputs = layers.capture_inputs(model, model.init(jax.random.key(0), x), x)
      >>> {name: x.shape for name, x in inputs.items()}
      {'__call__': (2, 4), 'layers_0': (2, 4), 'layers_2': (2, 5)}
    """
    return _run("capture_inputs", model, args, kwargs, INPUT)


def _run(caller, model, args, kwargs, what):
    """Runs the model; `what` is CALL for outputs and sown values, INPUT for inputs alone."""
    if isinstance(model, linen.Module):
        if not args or not isinstance(args[0], Mapping):
            raise TypeError(f"{caller}: a Linen module needs its variables as the first argument.")
        found, log = _run_linen(model, args, kwargs, what)
    elif isinstance(model, nnx.Module):
        found, log = _run_nnx(model, args, kwargs, what)
    else:
        raise TypeError(f"{caller}: {model!r} is not a module of flax.linen or flax.nnx.")
    place = {entry: i for i, entry in enumerate(log)}
    entries = [
        ((path, name, i), value)
        for path, name, values in _stored(found)
        for i, value in enumerate(values)
        if what == CALL or name == INPUT
    ]
    entries.sort(key=lambda entry: place.get(entry[0], len(place)))
    maps = OrderedDict()
    for (path, name, i), value in entries:
        parts = path or (CALL,) if name == what else (*path, name)
        label = "/".join(map(str, parts)) + (f"#{i + 1}" if i else "")
        for inner, leaf in jax.tree_util.tree_leaves_with_path(value):
            if getattr(leaf, "ndim", 0) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
                maps[label + jax.tree_util.keystr(inner)] = leaf
    return maps


def _stored(found, path=()):
    """Path, name and values of what Flax has stored, a tree of tuples with a value per call."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _stored(value, (*path, name))
        else:
            yield path, name, value if isinstance(value, tuple) else (value,)


# Flax stores values by path. The order of calls is noted apart from them, in a log of (path, name,
# how many of these before), which stays valid when a transform inside the model traces the values.


def _run_linen(model, args, kwargs, what):
    variables = {name: tree for name, tree in args[0].items() if name != "intermediates"}
    log = {}

    def note(module, method):
        """Flax calls this when a method returns, before it stores the output."""
        top = module
        while isinstance(top.parent, linen.Module):
            top = top.parent
        for path, name, values in _stored(top.variables.get("intermediates", {}), top.path):
            log.update(dict.fromkeys((path, name, i) for i in range(len(values))))
        if method == CALL:
            enter(module, CALL)
        return method == CALL

    def enter(module, name):
        before = module.variables.get("intermediates", {}).get(name, ())
        log[module.path, name, len(before)] = None

    def sow_input(call, args, kwargs, context):
        if context.method_name == CALL and args and isinstance(args[0], ARRAYS):
            enter(context.module, INPUT)
            context.module.sow("intermediates", INPUT, args[0])
        return call(*args, **kwargs)

    mutable = [*(variables.keys() - {"params"}), "intermediates"]
    if what == INPUT:
        with linen.intercept_methods(sow_input):
            _, updates = model.apply(variables, *args[1:], **kwargs, mutable=mutable)
    else:
        _, updates = model.apply(
            variables, *args[1:], **kwargs, mutable=mutable, capture_intermediates=note
        )
    return updates.get("intermediates", {}), log


def _run_nnx(model, args, kwargs, what):
    model = nnx.clone(model)
    log = {}

    def note(path, name):
        log[path, name, sum(entry[:2] == (path, name) for entry in log)] = None

    modules: dict[Any, Any] = dict(nnx.iter_modules(model))
    for path, module in modules.items():
        object.__setattr__(module, "__class__", _recording(type(module), what))
        module._note_sown = functools.partial(note, path)
    run = nnx.capture(lambda model: model(*args, **kwargs), nnx.Intermediate)
    _, found = run(model)
    return nnx.to_pure_dict(found), log


@functools.cache
def _recording(kind, what):
    """A subclass whose instances sow what they return or take, and note what they sow."""

    class Recording(kind):
        def __call__(self, *args, **kwargs):
            if what == INPUT and args and isinstance(args[0], ARRAYS):
                self.sow(nnx.Intermediate, INPUT, args[0])
            y = super().__call__(*args, **kwargs)
            if what == CALL:
                self.sow(nnx.Intermediate, CALL, y)
            return y

        def sow(self, variable_type, name, *args, **kwargs):
            self._note_sown(name)
            return super().sow(variable_type, name, *args, **kwargs)

    return Recording


__all__ = ["capture", "capture_inputs"]
