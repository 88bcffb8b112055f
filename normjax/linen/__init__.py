"""Every method as a Flax Linen module.

Parameters are in the collection `params`, running statistics in `batch_stats`; random numbers come
from the stream `ghost`. Where the collection `moments` is mutable, modules sow what their methods
observe of the input, as `seen`. The classes with the names of Flax's own have Flax's fields in
Flax's order, Flax's call signature and Flax's variable tree.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
from flax import linen as nn

import normjax
from normjax.core import checks
from normjax.core.fields import Configuration
from normjax.core.method import Traits, feature_sizes, observes, of_statistics, traits
from normjax.core.statistics import whole
from normjax.core.structs import from_dict, to_dict
from normjax.core.tracing import as_written

NOTE = """
    As a Linen module (`normjax.linen`) it takes these fields and those of `flax.linen.Module`;
    parameters are made when it is first called.
"""
SWITCH_NOTE = """    `use_running_average`, a field or an argument of the call,
    evaluates with the running statistics.
"""
FLAX_NOTE = """    Flax's `use_fast_variance` and `force_float32_reductions` are accepted
    and change nothing: the variance is always exact, and sums are in at least float32.
"""


class Front(nn.Module):
    """What all module classes share; use `Norm`, or a class with the name of a method.

    Example:
      >>> import normjax.linen
      >>> isinstance(normjax.linen.BatchNorm(), normjax.linen.Front)
      True
    """

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None, **inputs):
        """Normalizes `x`, with the running statistics if `use_running_average`.

        This may be a field instead; methods that treat training and evaluation alike need neither.
        `mask` and `inputs` are those of the method. While the module is being initialized it
        evaluates, so that no mapped axis is needed and the statistics stay as they are.
        """
        method = self.method_of()
        evaluate = self.evaluates(use_running_average)
        train = not evaluate and not self.is_initializing()
        features = feature_sizes(method, jax.numpy.shape(x))
        params, state = shapes = self._shapes(x)

        def initial(key, part, name):
            if self.is_initializing():
                return to_dict(method.init(key, features)[part])[name]
            # Flax compares the shape with that of the variable.
            empty = lambda a: jax.lax.empty(a.shape, a.dtype)
            return jax.tree.map(empty, to_dict(shapes[part])[name])

        kept = lambda n: self.variable("batch_stats", n, initial, jax.random.key(0), 1, n)
        made = {name: self.param(name, initial, 0, name) for name in to_dict(params)}
        cells = {name: kept(name) for name in to_dict(state)}
        params = from_dict(params, made)
        state = from_dict(state, {name: cell.value for name, cell in cells.items()})
        key = self.make_rng("ghost") if train and traits(method).random else None
        wanted = self.is_mutable_collection("moments") and not self.is_initializing()

        def run():
            how = dict(train=train, mask=mask, key=key, **inputs)
            y, moved = method.apply(params, state, x, **how)
            seen = wanted and observes(method) and method.observe(x, mask, **of_statistics(inputs))
            return y, (moved, seen and whole(seen))

        y, (moved, seen) = as_written(run, x)
        if train:
            for name, value in to_dict(moved).items():
                cells[name].value = value
        if seen:
            self.sow("moments", "seen", seen)
        return y

    def _shapes(self, x):
        method = self.method_of()
        features = feature_sizes(method, jax.numpy.shape(x))
        return _shapes(method, features, jax.config.read("jax_enable_x64"))

    def unpack(self, x: Any) -> tuple[Any, Any]:
        """Parameters and state of the method, for an input `x`, as the variables are now."""
        params, state = self._shapes(x)
        get = lambda name: nn.unbox(self.variables).get(name, {})
        return from_dict(params, get("params")), from_dict(state, get("batch_stats"))

    def evaluates(self, use_running_average: bool | None) -> bool:
        """Whether a call with this argument evaluates; ValueError if nobody says so."""
        if not traits(self.method_of()).trains:
            return bool(use_running_average)
        field = getattr(self, "use_running_average", None)
        return nn.merge_param("use_running_average", field, use_running_average)

    def method_of(self) -> Any:
        """The method of this module."""
        raise TypeError("Use normjax.linen.Norm(method) or a class with the name of a method.")


@functools.lru_cache
def _shapes(method, features, _):
    """Shapes of what `init` makes, of layers alike once."""
    return jax.eval_shape(lambda: method.init(jax.random.key(0), features))


class Norm(Front):
    """Any method as a module, such as `Norm(nj.chain(nj.LayerNorm(), nj.Affine()))`.

    Attributes:
      method: the method (else ValueError).
      use_running_average: evaluate with the running statistics instead of training; a field or an
        argument of the call (else ValueError).

    Example:
      >>> import jax, normjax as nj, normjax.linen
      >>> norm = normjax.linen.Norm(nj.Ghost(nj.BatchNorm(), groups=2))
      >>> x = jax.numpy.ones((8, 3))
      >>> variables = norm.init(jax.random.key(1), x, use_running_average=False)
      >>> y, new = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    """

    method: Any
    use_running_average: bool | None = None

    def method_of(self) -> Any:
        """The method, checked."""
        checks.require("Norm", "method", self.method, checks.method)
        return self.method


def _module(method):
    """The module class of `method`, with its documentation and fields, and Flax's own."""
    own = sorted(dataclasses.fields(method), key=lambda f: f.kw_only is True)
    fields = {f.name: (f.type, f.default) for f in own}
    alike = isinstance(method.traits, Traits) and not method.traits.trains  # a wrapper asks later
    switch = {} if alike else {"use_running_average": (bool | None, None)}
    flax = getattr(nn, method.__name__, None)
    theirs = {} if flax is None else {f.name: (f.type, f.default) for f in dataclasses.fields(flax)}
    declared = theirs | fields | switch  # in Flax's order
    notes = (NOTE, SWITCH_NOTE if switch else "", FLAX_NOTE if theirs else "")

    def body(namespace):
        namespace["__module__"] = __name__
        namespace["__doc__"] = method.__doc__.rstrip() + "\n" + "".join(notes)
        namespace["__annotations__"] = {}
        for name, (kind, default) in declared.items():
            if name not in ("parent", "name"):
                namespace["__annotations__"][name] = kind
                if default is not dataclasses.MISSING:
                    namespace[name] = default
        namespace["method_of"] = lambda self: method(**{f: getattr(self, f) for f in fields})

    return types.new_class(method.__name__, (Front,), {}, body)


MODULES = {
    name: _module(thing)
    for name, thing in vars(normjax).items()
    if isinstance(thing, type) and issubclass(thing, Configuration)
}
globals().update(MODULES)  # their types are in the stub
__all__ = sorted(["Front", "Norm", *MODULES])  # pyright: ignore[reportUnsupportedDunderAll]
