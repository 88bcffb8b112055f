"""Models without the norms that were folded, and their variables."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import core, linen, nnx

import normjax.linen
from normjax.core import passes


class Rest(nnx.Module):
    """What is left of a norm that was folded: its activation, and the dtype of its output.

    It takes the place of the norm in a folded model of NNX, and takes the same arguments.

    Example:
      >>> import jax, normjax.folding as folding
      >>> folding.Rest(jax.nn.relu, None)(jax.numpy.array([-1.0, 1.0]), use_running_average=True)
      Array([0., 1.], dtype=float32)
    """

    def __init__(self, activation: Callable[[jax.Array], jax.Array] | None, dtype: Any):
        self.activation = activation
        self.dtype = dtype

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The activation of `x`, in at least float32, rounded to `dtype` or that of `x`."""
        return _rest(self.activation, self.dtype, x)


def _rest(activation, dtype, x):
    wide = x.astype(passes.wide(x.dtype))
    return passes.activate(activation, wide).astype(passes.output_dtype(dtype, x))


@dataclasses.dataclass(frozen=True)
class _Folds:
    """A model, which `linen.Module` would make a child if it were a field, and what to change."""

    model: linen.Module
    skipped: tuple[tuple[Any, ...], ...]  # path, activation and dtype of norms left out
    changed: tuple[tuple[Any, tuple[tuple[str, Any], ...]], ...]  # path and new fields


class FoldedModel(linen.Module):
    """A Linen model that leaves out the norms that were folded; `fold` makes it.

    It is called as the model, and has its variables at the same paths: those of the same code
    without the folded norms, and with `use_bias=True` in the layers that took them. That code runs
    with these variables too.

    Attributes:
      folds: the model, and what is different.

    Example:
      >>> import jax, flax.linen as nn, normjax.folding as folding, normjax.linen
      >>> norm = normjax.linen.BatchNorm(use_running_average=True)
      >>> model, x = nn.Sequential([nn.Dense(2, use_bias=False), norm]), jax.numpy.ones((3, 4))
      >>> folded = folding.fold(model, model.init(jax.random.key(0), x), x).model
      >>> without = nn.Sequential([nn.Dense(2)])
      >>> folded.apply(without.init(jax.random.key(0), x), x).shape
      (3, 2)
    """

    folds: _Folds

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        skipped = {path: rest for path, *rest in self.folds.skipped}
        changed = {path: dict(fields) for path, fields in self.folds.changed}

        def run(call, args, kwargs, context):
            module = context.module
            path = module.path[len(self.path) :]
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if path in skipped:
                return _rest(*skipped[path], *args[:1])
            fields = changed.get(path, {})
            if all(getattr(module, name) == value for name, value in fields.items()):
                return call(*args, **kwargs)
            return module.clone(parent=module.scope, **fields)(*args, **kwargs)

        with linen.intercept_methods(run):
            return self.folds.model.clone(parent=self.scope)(*args, **kwargs)


def _affine_fields(method):
    """The fields by which a method goes without scale and bias."""
    return {name: False for name in ("use_scale", "use_bias") if hasattr(method, name)}


class LinenEdit:
    """The variables of a Linen model, to be changed."""

    def __init__(self, model, variables):
        self.model = model
        self.old = variables
        self.new = jax.tree.map(lambda a: a, core.unfreeze(variables))
        self.skipped = []
        self.changed = collections.defaultdict(dict)

    def leaf(self, call, name):
        return ("params", *call.path, name)

    def norm(self, call):
        at = {name: _at(tree, call.path) for name, tree in self.old.items()}
        bound = call.module.bind({name: tree for name, tree in at.items() if tree is not None})
        return call.module.method_of(), *bound.unpack(call.args[0])

    def layer(self, call):
        own = linen.unbox(_at(self.new["params"], call.path))
        return own["kernel"], own.get("bias")

    def write(self, call, kernel, bias):
        own = _at(self.new["params"], call.path)
        for name, value in (("kernel", kernel), ("bias", bias)):
            old = own.get(name)
            if value is not None:
                boxed = isinstance(old, core.meta.AxisMetadata)
                own[name] = old.replace_boxed(value) if boxed else value
                if old is None:
                    self.changed[call.path]["use_bias"] = True

    def leave(self, call, left):
        if left is not None:
            self.skipped.append((call.path, *left))
            for name in self.new:
                self.new[name] = _without(self.new[name], call.path)
            return
        for name in ("scale", "bias"):
            self.new["params"] = _without(self.new["params"], (*call.path, name))
        method = call.module.method_of()
        fields = _affine_fields(method)
        if isinstance(call.module, normjax.linen.Norm):
            fields = {"method": dataclasses.replace(method, **fields)}
        self.changed[call.path] |= fields

    def result(self):
        changed = tuple((path, tuple(fields.items())) for path, fields in self.changed.items())
        model = FoldedModel(_Folds(self.model, tuple(self.skipped), changed))
        return model, {name: tree for name, tree in self.new.items() if tree or not self.old[name]}


def _at(tree, path) -> Any:
    """The part of nested dicts at a path, or None."""
    for name in path:
        tree = None if tree is None else tree.get(name)
    return tree


def _without(tree, path):
    """Nested dicts without the part at a path, and without what is then empty."""
    if path[0] not in tree:
        return tree
    inner = _without(tree[path[0]], path[1:]) if path[1:] else {}
    rest = {name: part for name, part in tree.items() if name != path[0]}
    return {**rest, path[0]: inner} if inner else rest


class NnxEdit:
    """A copy of an NNX model, to be changed: `LinenEdit` for modules that hold their variables."""

    def __init__(self, model):
        self.model = nnx.clone(model)
        self.modules: dict[Any, Any] = dict(nnx.iter_modules(self.model))

    def leaf(self, call, name):
        return (*map(str, call.path), name)

    def norm(self, call):
        if not self._holders(call):
            raise ValueError("the model holds it in a list or dict: take nnx.List or nnx.Dict")
        norm = self.modules[call.path]
        return norm.method, *norm.unpack()

    def layer(self, call):
        own = self.modules[call.path]
        return own.kernel[...], None if own.bias is None else own.bias[...]

    def write(self, call, kernel, bias):
        own = self.modules[call.path]
        own.kernel.set_value(kernel)
        if bias is None:
            return
        if own.bias is not None:
            own.bias.set_value(bias)
            return
        own.bias = nnx.Param(bias)
        if hasattr(own, "use_bias"):
            own.use_bias = True

    def leave(self, call, left):
        if left is not None:
            rest = Rest(*left)
            for holder, name in self._holders(call):
                setattr(holder, name, rest)
            return
        norm = self.modules[call.path]
        for name in _affine_fields(norm.method):
            setattr(norm, name, False)
            setattr(norm, name.removeprefix("use_"), nnx.data(None))

    def _holders(self, call):
        """The modules with an attribute that is the module of a call, and its name."""
        own = self.modules[call.path]
        every = [m for _, m in nnx.iter_modules(self.model)]
        return [(m, name) for m in every for name, value in vars(m).items() if value is own]

    def result(self):
        return self.model, None
