"""Every method as a Flax NNX module.

Parameters are `nnx.Param`, running statistics `nnx.BatchStat`, random numbers come from the stream
`ghost`. The classes with the names of Flax's own have Flax's arguments, call signature and variable
tree. `model.train()`, `model.eval()` and `nnx.view` switch `use_running_average`.
"""

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx.module import first_from
from flax.traverse_util import flatten_dict, unflatten_dict

import normjax
from normjax import kernels
from normjax.core.fields import Configuration
from normjax.core.method import observes, of_statistics, traits
from normjax.core.statistics import whole
from normjax.core.structs import to_dict
from normjax.core.tracing import as_written, without_initializers

NOTE = """
    As an NNX module (`normjax.nnx`) it takes `num_features` first, these fields,
    `use_running_average` (False: calls train), `rngs`, and `scale_metadata` and `bias_metadata` for
    the variables.
"""
FLAX_NOTE = """    Flax's `use_fast_variance` is accepted and changes nothing: the variance is
    always exact. A `promote_dtype` of your own is refused: `dtype` sets the dtype of the output.
"""


class Seen(nnx.Intermediate):
    """What norms observed of their inputs, `seen`: what `nnx.capture(model, Seen)` returns.

    Example:
      >>> import jax, normjax.nnx
      >>> from flax import nnx
      >>> norm = normjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> nnx.capture(norm, Seen)(jax.numpy.ones((8, 3)))[1]["seen"][0].mean.tolist()
      [1.0, 1.0, 1.0]
    """


class Norm(nnx.Module):
    """Any method as a module, such as `Norm(nj.chain(nj.LayerNorm(), nj.Affine()), 64, rngs=rngs)`.

    Attributes:
      method: the method (else ValueError); its fields are readable on the module.
      use_running_average: whether calls evaluate with the running statistics instead of training.

    Example:
      >>> import jax, normjax as nj, normjax.nnx
      >>> from flax import nnx
      >>> norm = normjax.nnx.Norm(nj.Ghost(nj.BatchNorm(), groups=2), 3, rngs=nnx.Rngs(0))
      >>> y = norm(jax.numpy.ones((8, 3)))
      >>> sorted(nnx.state(norm))
      ['bias', 'mean', 'scale', 'var']
    """

    def __init__(
        self,
        method: Any,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Makes parameters and statistics for `num_features` on the feature axis, or axes.

        Args:
          rngs: the stream `params` initializes; `ghost` is kept if the method draws random numbers.
          metadata: of variables by name, as `{"scale": {"sharding_names": ("model",)}}`.
        """
        kernels.require_activations(method)
        self._configuration = _Configuration(method)
        self.num_features = num_features
        if traits(method).trains:
            self.use_running_average = use_running_average
        if traits(method).random:
            self.rngs = rngs["ghost"].fork()
        params, state = method.init(jax.random.key(0), num_features)
        self._structure = jax.tree.structure((params, state))
        flat = lambda tree: flatten_dict(to_dict(tree))
        fresh = lambda path: flat(method.init(rngs.params(), num_features)[0])[path]
        about = lambda path: (metadata or {}).get(path[-1], {})
        made = {p: nnx.Param(fresh(p), **about(p)) for p in flat(params)}
        made |= {p: nnx.BatchStat(a, **about(p)) for p, a in flat(state).items()}
        variables = unflatten_dict(made)
        for name in dict.fromkeys((*getattr(params, "_fields", ()), *variables)):
            value = variables.get(name)
            setattr(self, name, _nested(value) if isinstance(value, dict) else nnx.data(value))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        **inputs: Any,
    ) -> jax.Array:
        """Normalizes `x` and, in training, moves the statistics.

        `use_running_average` overrides the attribute; `mask` and `inputs` are those of the method.
        """
        said, field = use_running_average, getattr(self, "use_running_average", False)
        if not (said is None or isinstance(said, bool)):
            hint = "is not True or False; a mask is given by name."
            raise TypeError(f"{type(self).__name__}: use_running_average={said!r} {hint}")
        hint = "use_running_average was given neither at construction nor at the call."
        evaluate = first_from(said, field, error_msg=f"{type(self).__name__}: {hint}")
        return self._normalize(x, evaluate, mask, inputs)

    def _normalize(self, x, evaluate, mask, inputs):
        params, state = self.unpack()
        key = self.rngs() if not evaluate and traits(self.method).random else None
        how = dict(train=not evaluate, mask=mask, key=key, **inputs)
        wanted = Seen in map(type, getattr(self, "__captures__", ())) and observes(self.method)

        def run():
            y, moved = self.method.apply(params, state, x, **how)
            seen = wanted and self.method.observe(x, mask, **of_statistics(inputs))
            return y, (moved, seen and whole(seen))

        y, (moved, seen) = as_written(run, x)
        if not evaluate:
            self.pack(moved)
        if seen:
            self.sow(Seen, "seen", seen)
        return y

    def unpack(self) -> tuple[Any, Any]:
        """Parameters and state of the method, as the variables are now."""
        params, state = jax.tree.unflatten(self._structure, range(self._structure.num_leaves))
        return self._values(params), self._values(state)

    def pack(self, state: Any) -> None:
        """Sets the running statistics to those of a state of the method."""
        for path, value in flatten_dict(to_dict(state)).items():
            self._variable(path).set_value(jax.lax.stop_gradient(value))

    def set_view(self, use_running_average: bool | None = None):
        """Used by `nnx.view`.

        Args:
          use_running_average: evaluate with the running statistics; None leaves the attribute
            alone.
        """
        if use_running_average is not None and traits(self.method).trains:
            self.use_running_average = use_running_average

    @property
    def method(self) -> Any:
        """The method."""
        return vars(self)["_configuration"].method

    def __getattr__(self, name: str) -> Any:
        if name in _fields(self):
            return getattr(self.method, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _fields(self):
            value = _Configuration(dataclasses.replace(self.method, **{name: value}))
            name = "_configuration"
        super().__setattr__(name, value)

    def _variable(self, path) -> Any:
        value = getattr(self, path[0], None)
        for name in path[1:]:
            value = None if value is None else value.get(name)
        return value

    def _values(self, tree, path=()):
        """Parameters or state as the variables are now: optional ones may come and go."""
        if tree == ():
            return tree
        values = {}
        for name, part in (tree if isinstance(tree, dict) else tree._asdict()).items():
            at = (*path, name)
            variable = self._variable(at)
            if isinstance(part, dict | tuple):
                values[name] = self._values(part, at)
            elif variable is not None or name in getattr(tree, "_field_defaults", ()):
                values[name] = None if variable is None else variable[...]
            else:
                raise AttributeError(
                    f"{type(self).__name__}: {'.'.join(at)} is gone, which {self.method!r} needs."
                )
        return values if isinstance(tree, dict) else type(tree)(**values)


class NormalizedKernels(nnx.Module):
    """A layer, or a whole model, whose kernels are normalized: `NormalizedKernels(layer, method)`.

    The parameters of the module stay as they are: a call runs a copy of it, with normalized kernels
    and otherwise the same variables. `kernels` has what the method learns, the norms of
    `WeightNorm`; `kernel_stats` the vectors of `SpectralWeightNorm`, which `step` moves, and no
    call. Take one step before the calls of a training step; of all wrappers in a model:

        for _, module in nnx.iter_modules(model):
            if isinstance(module, normjax.nnx.NormalizedKernels):
                module.step()

    Inside of `nnx.scan` and `nnx.vmap` wrap the layers, not the stack: in a stack of kernels rows
    would reach over its layers.

    Attributes:
      module: the layer or model.
      method: a method over kernels, such as `normjax.WeightNorm()`, for all of them.
      patterns: which parameters are kernels, as in `normjax.optim`, such as `("conv_*/kernel",)`;
        None: those called `kernel`.

    Raises:
      ValueError: for a method over activations, a pattern that matches nothing, and a module
        without kernels.

    Example:
      >>> import jax, normjax as nj, normjax.nnx
      >>> from flax import nnx
      >>> plain, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.numpy.ones((2, 4))
      >>> layer = normjax.nnx.NormalizedKernels(plain, nj.WeightNorm())
      >>> layer.kernels["kernel"]["scale"].shape
      (3,)
      >>> bool(jax.numpy.allclose(layer(x), plain(x), atol=1e-6))
      True
    """

    def __init__(
        self,
        module: nnx.Module,
        method: Any,
        patterns: tuple[str, ...] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        """Wraps `module`, trained or not; the stream `params` of `rngs` starts power iterations."""
        kernels.require(method)
        self.module = module
        self.patterns = None if patterns is None else tuple(patterns)
        self._configuration = _Configuration(method)
        key = jax.random.key(0) if rngs is None else rngs.params()
        params, state = map(unflatten_dict, kernels.initial(method, key, self._kernels()))
        self.kernels = _nested(jax.tree.map(nnx.Param, params))
        self.kernel_stats = _nested(jax.tree.map(nnx.BatchStat, state))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module for these arguments, with normalized kernels."""
        return self._normal()(*args, **kwargs)

    def step(self) -> None:
        """Moves what the method keeps of the kernels, where it keeps anything."""
        _, state = kernels.normalize(self.method, self._kernels(), *self._own(), train=True)
        nnx.update(self.kernel_stats, unflatten_dict(state))

    def unwrap(self) -> Any:
        """A plain module that does the same, with variables of its own."""
        return nnx.clone(self._normal())

    @property
    def method(self) -> Any:
        """The method."""
        return self._configuration.method

    def _own(self):
        """Values of what the method learns and keeps, as nested dicts."""
        own = (self.kernels, self.kernel_stats)
        return tuple(nnx.to_pure_dict(nnx.state(part)) for part in own)

    def _kernels(self):
        flat = nnx.to_flat_state(nnx.state(self.module, nnx.Param))
        pairs = zip(flat.paths, flat.leaves, strict=True)
        return kernels.named({_names(path): v[...] for path, v in pairs}, self.patterns)

    def _normal(self):
        """The module with normalized kernels, and otherwise the same variables."""
        normal, _ = kernels.normalize(self.method, self._kernels(), *self._own())
        structure, state = nnx.split(self.module)
        flat = nnx.to_flat_state(state)
        put = lambda path, v: v.replace(normal[_names(path)]) if _names(path) in normal else v
        pairs = [(path, put(path, v)) for path, v in zip(flat.paths, flat.leaves, strict=True)]
        return nnx.merge(structure, nnx.from_flat_state(pairs))


def _names(path):
    return tuple(map(str, path))


class _Configuration:
    """A method as static metadata of a module, for whose equality initializers do not count.

    Else modules with two times `nnx.initializers.constant(0.1)` could not be stacked.
    """

    def __init__(self, method):
        self.method = method
        is_dataclass = dataclasses.is_dataclass(method)
        self._counts = without_initializers(method) if is_dataclass else method

    def __eq__(self, other):
        return isinstance(other, _Configuration) and self._counts == other._counts

    def __hash__(self):
        return hash(self._counts)

    def __repr__(self):
        return repr(self.method)


def _fields(module):
    """Names of the fields of the module's method, which read and set as the module's own."""
    configuration = vars(module).get("_configuration", _Configuration(None))
    return getattr(configuration.method, "__dataclass_fields__", {}).keys() - {"method"}


def _nested(tree):
    return nnx.Dict({k: _nested(v) if isinstance(v, dict) else v for k, v in tree.items()})


def _module(method):
    """The module class of `method`: it takes the fields of the method and has its documentation."""
    like_flax = hasattr(nnx, method.__name__)

    def __init__(
        self,
        num_features,
        *args,
        use_running_average=False,
        rngs,
        scale_metadata=None,
        bias_metadata=None,
        **given,
    ):
        if like_flax:
            given.pop("use_fast_variance", None)
            _check_promotion(type(self).__name__, given.pop("promote_dtype", None))
        metadata = {"scale": scale_metadata or {}, "bias": bias_metadata or {}}
        how = dict[str, Any](use_running_average=use_running_average, rngs=rngs, metadata=metadata)
        Norm.__init__(self, method(*args, **given), num_features, **how)

    def call_with_mask(self, x, mask=None, **how):
        return Norm.__call__(self, x, mask=mask, **how)

    def body(namespace):
        namespace["__module__"] = __name__
        notes = (NOTE, FLAX_NOTE if like_flax else "")
        namespace["__doc__"] = method.__doc__.rstrip() + "\n" + "".join(notes)
        namespace["__init__"] = __init__
        if method is normjax.RMSNorm:  # as Flax's
            namespace["__call__"] = call_with_mask

    return types.new_class(method.__name__, (Norm,), {}, body)


def _check_promotion(name, promote):
    flax = inspect.signature(nnx.LayerNorm.__init__).parameters.get("promote_dtype")
    if promote not in (None, getattr(flax, "default", None)):
        raise ValueError(
            f"{name}: promote_dtype={promote!r} is not supported: statistics and arithmetic are in "
            "at least float32, and `dtype` sets the dtype of the output."
        )


MODULES = {
    name: _module(thing)
    for name, thing in vars(normjax).items()
    if isinstance(thing, type) and issubclass(thing, Configuration) and not kernels.over(thing)
}
globals().update(MODULES)  # their types are in the stub
__all__ = sorted(["Norm", "NormalizedKernels", "Seen", *MODULES])  # pyright: ignore[reportUnsupportedDunderAll]
