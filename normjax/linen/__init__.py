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
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

import normjax
from normjax import kernels
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
        kernels.require_activations(self.method)
        return self.method


class NormalizedKernels(nn.Module):
    """A layer, or a whole model, whose kernels are normalized: `NormalizedKernels(nn.Dense(3), m)`.

    The parameters of the module stay as they are: a call runs it with normalized kernels in their
    place. `params` has an entry `kernels` for what the method learns, the norms of `WeightNorm`.
    The vectors of `SpectralWeightNorm` are in the collection `kernel_stats`, and no call moves them
    but those that have it mutable. `step` does: take one before the calls of a training step, all
    of which then use one estimate. For wrappers inside of a model one call in evaluation mode with
    `mutable=["kernel_stats"]` does it for all; under `jit` that costs no pass through the model.

    Inside of `nn.scan` and `nn.vmap` wrap the layers, not the stack: in a stack of kernels rows
    would reach over its layers.

    Attributes:
      module: the layer or model.
      method: a method over kernels, such as `normjax.WeightNorm()`, for all of them.
      patterns: which parameters are kernels, as in `normjax.optim`, such as `("conv_*/kernel",)`;
        None: those called `kernel`.

    Raises:
      ValueError: in calls, for a method over activations, a pattern that matches nothing, and a
        module without kernels.

    Example:
      >>> import jax, flax.linen as nn, normjax as nj, normjax.linen
      >>> x = jax.numpy.ones((2, 4))
      >>> layer = normjax.linen.NormalizedKernels(nn.Dense(3), nj.WeightNorm())
      >>> variables = layer.init(jax.random.key(0), x)
      >>> sorted(variables["params"]), variables["params"]["kernels"]["kernel"]["scale"].shape
      (['kernels', 'module'], (3,))
      >>> plain = layer.unwrap(variables)
      >>> bool(jax.numpy.allclose(nn.Dense(3).apply(plain, x), layer.apply(variables, x)))
      True
    """

    module: nn.Module
    method: Any
    patterns: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, *args, **kwargs):
        """The output of the module for these arguments, with normalized kernels."""
        if self.is_initializing():
            self.module(*args, **kwargs)  # makes the parameters
        plain = self._kernels(self.module.variables)
        fresh = lambda key: tuple(map(unflatten_dict, kernels.initial(self.method, key, plain)))
        params, state = jax.eval_shape(fresh, jax.random.key(0))
        cell = None
        if flatten_dict(params):
            params = self.param("kernels", lambda key: fresh(key)[0])
        if flatten_dict(state):
            start = lambda: fresh(self.make_rng("params"))[1]
            cell = self.variable("kernel_stats", "kernels", start)
            state = cell.value
        move = self.is_mutable_collection("kernel_stats") and not self.is_initializing()
        normal, state = kernels.normalize(self.method, plain, params, state, train=move)
        if move and cell is not None:
            cell.value = unflatten_dict(state)
        with_normal = lambda variables: {"params": _replaced(variables["params"], normal)}
        run = lambda module: module(*args, **kwargs)
        return nn.map_variables(run, "params", trans_in_fn=with_normal)(self.module)

    def step(self, variables: Any) -> dict[str, Any]:
        """The variables of this module, unbound, with what the method keeps moved by one step."""
        _, state = self._normalize(variables, train=True)
        if not any(state.values()):
            return {**variables}
        return {**variables, "kernel_stats": {"kernels": unflatten_dict(state)}}

    def wrap(self, variables: Any, key: Any = None) -> dict[str, Any]:
        """The variables of this module, unbound, for those of the plain one, trained or not.

        `key` (None: 0) starts power iterations.
        """
        key = jax.random.key(0) if key is None else key
        params, state = kernels.initial(self.method, key, self._kernels(variables))
        wrapped = {name: {"module": tree} for name, tree in variables.items()}
        if any(params.values()):
            wrapped["params"]["kernels"] = unflatten_dict(params)
        if any(state.values()):
            wrapped["kernel_stats"] = {"kernels": unflatten_dict(state)}
        return wrapped

    def unwrap(self, variables: Any) -> dict[str, Any]:
        """The variables of the plain module that does the same as this one, unbound."""
        plain = {name: tree["module"] for name, tree in variables.items() if "module" in tree}
        normal, _ = self._normalize(variables)
        return plain | {"params": _replaced(plain["params"], normal)}

    def _normalize(self, variables, **how):
        """The normalized kernels and the state, of variables of this module, unbound."""
        own = (variables.get(name, {}).get("kernels", {}) for name in ("params", "kernel_stats"))
        plain = self._kernels({"params": variables["params"]["module"]})
        return kernels.normalize(self.method, plain, *own, **how)

    def _kernels(self, variables):
        kernels.require(self.method)
        params = flatten_dict(nn.unbox(variables).get("params", {}))
        return kernels.named(params, self.patterns)


def _replaced(params, values):
    """Parameters with some in place of others, by path, in the boxes of these."""
    flat = flatten_dict(params)
    new = {path: meta.replace_boxed(flat[path], value) for path, value in values.items()}
    return unflatten_dict(flat | new)


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
    if isinstance(thing, type) and issubclass(thing, Configuration) and not kernels.over(thing)
}
globals().update(MODULES)  # their types are in the stub
__all__ = sorted(["Front", "NormalizedKernels", "Norm", *MODULES])  # pyright: ignore[reportUnsupportedDunderAll]
