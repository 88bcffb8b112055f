"""What the modules of a Flax model take, do and return, seen from outside."""

import dataclasses
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.typing import PathParts

from normjax.paths import arrays_of

CALL, INPUT = "__call__", "__input__"
ARRAYS = jax.Array | np.ndarray


class Call(NamedTuple):
    """A call of a module: what it was called with, what it returned, and the module as a function.

    `function(*args, **kwargs)` runs this module alone and returns its output. It is pure: it has
    the variables and random numbers of the call, and moves neither. It takes other inputs too, and
    works under `jax.jit`, `jax.grad` and `jax.vmap`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, normjax.analysis.layers as layers
      >>> model, x = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)]), jnp.ones((2, 4))
      >>> *_, last = layers.calls(model, model.init(jax.random.key(0), x), x)
      >>> jax.jacobian(last.function)(last.args[0][0]).shape
      (3, 5)
    """

    path: PathParts
    module: Any  # Linen: with its fields, unbound; NNX: the one of the model
    variables: Any  # of the module: Linen: its collections; NNX: a tree by name
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    @property
    def name(self) -> str:
        """The path as text, "__call__" for the model itself."""
        return _label(self.path or (CALL,))


def calls(model: linen.Module | nnx.Module, *args: Any, **kwargs: Any) -> list[Call]:
    """Runs a model once and returns the calls of its modules, in the order in which they begin.

    A Linen model takes what `model.apply` does, the variables first (all of them but parameters are
    mutable). Works under `jax.jit` and `nnx.jit`, of whose programs the arrays of the calls are
    part. The model and its variables stay as they were, also in training mode. TypeError for what
    is no Flax module, or no variables in Linen.

    Arrays are values, also of what runs inside of `remat` and `jit` (those of a program that
    `nn.jit` made before come later). What `scan` calls several times is there as often, in a row;
    in Linen if the scan lets "intermediates" through. A function in Linen knows the variables below
    the path of its module alone, without those of modules that the module got as a field.

    Example:
      >>> import jax, normjax.nnx, normjax.analysis.layers as layers
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), normjax.nnx.LayerNorm(5, rngs=rngs))
      >>> found = layers.calls(model, jax.numpy.ones((2, 4)))
      >>> [(call.name, call.kind, call.output.shape) for call in found[1:]]
      [('layers/0', 'Linear', (2, 5)), ('layers/1', 'LayerNorm', (2, 5))]
    """
    found, place = _run("calls", model, args, kwargs)
    every = []
    for path, _, i in sorted((e for e in found if e[1] == INPUT), key=place.__getitem__):
        for inputs, output in _unstacked(found[path, INPUT, i], found[path, CALL, i]):
            how, variables = inputs.how, inputs.how.own(inputs.variables)
            function = functools.partial(how.run, inputs.variables)
            args, kwargs = how.given(inputs.arrays)
            every.append(Call(path, how.module, variables, function, args, kwargs, output))
    return every


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
    found, place = _run("capture", model, args, kwargs)
    return _maps({entry: value for entry, value in found.items() if entry[1] != INPUT}, place)


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
    found, place = _run("capture_inputs", model, args, kwargs)
    first = {}
    for entry, inputs in found.items():
        if entry[1] == INPUT:
            args, _ = inputs.how.given(inputs.arrays)
            first |= {entry: args[0]} if args and isinstance(args[0], ARRAYS) else {}
    return _maps(first, place)


def _label(parts):
    return "/".join(map(str, parts))


def _maps(found, place):
    """Entries by name in their order, in parts if they are no arrays; see `capture`."""
    maps = OrderedDict()
    for path, name, i in sorted(found, key=place.__getitem__):
        parts = path or (CALL,) if name in (CALL, INPUT) else (*path, name)
        label = _label(parts) + (f"#{i + 1}" if i else "")
        for inner, leaf in jax.tree_util.tree_leaves_with_path(found[path, name, i]):
            if getattr(leaf, "ndim", 0) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
                maps[label + jax.tree_util.keystr(inner)] = leaf
    return maps


@dataclasses.dataclass(frozen=True, eq=False)
class _How:
    """What is known of a call when its program is made."""

    module: Any
    run: Callable[..., Any]  # of variables, args and kwargs
    own: Callable[[Any], Any]  # variables by name
    given: Callable[[Any], Any]  # makes args and kwargs of their arrays
    shapes: list[tuple[int, ...]]  # of the arrays


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays", "variables"], meta_fields=["how"]
)
@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a call takes: its arrays, and the variables that its module has then."""

    arrays: dict[int, Any]
    variables: Any
    how: _How


def _inputs(module, run, own, variables, args, kwargs):
    arrays, given = arrays_of((args, kwargs))
    shapes = [a.shape for a in jax.tree.leaves((arrays, variables))]
    return _Inputs(arrays, variables, _How(module, run, own, given, shapes))


def _unstacked(inputs, output):
    """The calls of which the arrays are on their first axes, where `scan` has stacked any."""
    leaves = jax.tree.leaves((inputs.arrays, inputs.variables))
    pairs = zip(leaves, inputs.how.shapes, strict=True)
    lead = max((a.shape[: a.ndim - len(shape)] for a, shape in pairs), default=())
    if not lead:
        return [(inputs, output)]
    at = lambda index: jax.tree.map(operator.itemgetter(index), (inputs, output))
    return list(map(at, np.ndindex(*lead)))


def _run(caller, model, args, kwargs):
    """What the modules of a model take, return and sow in a run, and in which order.

    Both are by the path of the module, a name, and how many of these were before. Flax stores the
    values; the order is noted apart from them, and so stays valid when a transform inside the model
    traces the values.
    """
    if isinstance(model, nnx.Module):
        found, log = _run_nnx(model, args, kwargs)
    elif not isinstance(model, linen.Module):
        raise TypeError(f"{caller}: {model!r} is not a module of flax.linen or flax.nnx.")
    elif not args or not isinstance(args[0], Mapping):
        raise TypeError(f"{caller}: a Linen module needs its variables as the first argument.")
    else:
        found, log = _run_linen(model, args, kwargs)
    found = dict(_stored(found))
    return found, {entry: i for i, entry in enumerate([*log, *(e for e in found if e not in log)])}


def _stored(found, path=()):
    """Entries and their values, of what Flax has stored: a tree of tuples."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _stored(value, (*path, name))
        else:
            values = value if isinstance(value, tuple) else (value,)
            yield from (((path, name, i), each) for i, each in enumerate(values))


def _run_linen(model, args, kwargs):
    variables = {name: tree for name, tree in args[0].items() if name != "intermediates"}
    log, running = {}, set()

    def keep(module, name, value):
        before = module.variables.get("intermediates", {}).get(name, ())
        if module.sow("intermediates", name, value):
            log[module.path, name, len(before)] = None

    def record(call, args, kwargs, context):
        module = context.module
        if context.method_name != CALL or module.path in running:  # by `super().__call__`
            return call(*args, **kwargs)
        running.add(module.path)
        keep(module, INPUT, _inputs(*_alone(module), args, kwargs))
        y = call(*args, **kwargs)
        root = module.scope.root
        every = _stored(root.variables().get("intermediates", {}), root.path)
        log.update(dict.fromkeys(entry for entry, _ in every))
        keep(module, CALL, y)
        running.remove(module.path)
        return y

    mutable = [*(variables.keys() - {"params"}), "intermediates"]
    with linen.intercept_methods(record):
        _, updates = model.apply(variables, *args[1:], **kwargs, mutable=mutable)
    return updates.get("intermediates", {}), log


def _alone(module):
    """A bound module unbound, as a function of what it has now, and that."""
    scope = module.scope
    module, variables = module.unbind()
    variables = {name: tree for name, tree in variables.items() if name != "intermediates"}
    mutable, drawn = [name for name in variables if name != "params"], _counts(scope.rng_counters)

    def call(module, *args, **kwargs):
        module.scope.rng_counters.update(_counts(drawn))
        return module(*args, **kwargs)

    def run(given, *args, **kwargs):
        variables, rngs = given
        how = dict(rngs=rngs, mutable=mutable, method=call)
        return module.apply(variables, *args, **how, **kwargs)[0]

    return module, run, operator.itemgetter(0), (variables, dict(scope.rngs))


def _counts(drawn):
    """A copy of how many random numbers a scope of Linen and those below it have drawn."""
    return {name: _counts(n) if isinstance(n, dict) else n for name, n in drawn.items()}


def _run_nnx(model, args, kwargs):
    own, model = dict(nnx.iter_modules(model)), nnx.clone(model)
    log = {}
    modules: dict[Any, Any] = dict(nnx.iter_modules(model))
    for path, module in modules.items():
        object.__setattr__(module, "__class__", _recording(type(module)))
        module._site = _Site(path, own[path], log)
    _, found = nnx.capture(lambda model: model(*args, **kwargs), nnx.Intermediate)(model)
    return nnx.to_pure_dict(found), log


class _Site:
    """A module of NNX, whose copies note what they sow."""

    def __init__(self, path, module, log):
        self.path, self.module, self.log, self.running = path, module, log, False
        self.structure, self.sown, state = nnx.split(module, nnx.Intermediate, ...)
        self.tree = jax.tree.structure(state)

    def note(self, name):
        self.log[self.path, name, sum(e[:2] == (self.path, name) for e in self.log)] = None

    def inputs(self, copy, args, kwargs):
        variables = jax.tree.leaves(nnx.split(copy, nnx.Intermediate, ...)[2])
        return _inputs(self.module, self.run, self.own, variables, args, kwargs)

    def own(self, variables):
        return nnx.to_pure_dict(jax.tree.unflatten(self.tree, variables))

    def run(self, variables, *args, **kwargs):
        state = jax.tree.unflatten(self.tree, variables)
        copy = nnx.merge(self.structure, self.sown, state, copy=True)
        call = lambda copy: copy(*args, **kwargs)
        return nnx.capture(call, nnx.Intermediate)(copy)[0]


@functools.cache
def _recording(kind):
    """A subclass whose instances sow what they take and return, and note what they sow."""

    class Recording(kind):
        def __call__(self, *args, **kwargs):
            if self._site.running:  # it calls itself
                return super().__call__(*args, **kwargs)
            self.sow(nnx.Intermediate, INPUT, self._site.inputs(self, args, kwargs))
            self._site.running = True
            y = super().__call__(*args, **kwargs)
            self._site.running = False
            self.sow(nnx.Intermediate, CALL, y)
            return y

        def sow(self, variable_type, name, *args, **kwargs):
            self._site.note(name)
            return super().sow(variable_type, name, *args, **kwargs)

    return Recording


__all__ = ["Call", "calls", "capture", "capture_inputs"]
