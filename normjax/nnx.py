"""Every method as a Flax NNX module.

One module serves all methods: parameters are `nnx.Param`, running statistics `nnx.BatchStat`,
random numbers come from the stream `ghost`. The classes with the names of Flax's own have Flax's
arguments, call signature and variable tree. `model.train()`, `model.eval()` and `nnx.view` switch
`use_running_average`.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

import normjax
from normjax.core import checks
from normjax.core.structs import to_dict
from normjax.core.tracing import alike

NOTE = """
    As an NNX module (`normjax.nnx`) it takes `num_features` first, these fields,
    `use_running_average` (False: calls train), `rngs`, and `scale_metadata` and `bias_metadata` for
    the variables.
"""
FLAX_NOTE = """    Flax's `use_fast_variance` is accepted and changes nothing: the variance is
    always exact. A `promote_dtype` of your own is refused: `dtype` sets the dtype of the output.
"""


class Norm(nnx.Module):
    """Any method as a module, such as `Norm(nj.chain(nj.LayerNorm(), nj.Affine()), 64, rngs=rngs)`.

    Attributes:
      method: the method, an object with `init` and `apply`; its fields are readable on the module.
      use_running_average: whether calls evaluate with the running statistics instead of training.

    Raises:
      ValueError: if `method` is none, or `num_features` does not suit it.

    Example:
      >>> import jax, normjax as nj, normjax.nnx
      >>> from flax import nnx
      >>> norm = normjax.nnx.Norm(nj.Ghost(nj.BatchNorm(), groups=2), 3, rngs=nnx.Rngs(0))
      >>> y = norm(jax.random.normal(jax.random.key(0), (8, 3)))
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
        """Makes parameters and statistics.

        Args:
          method: the method.
          num_features: size of the feature axis, or sizes of the feature axes.
          use_running_average: as the attribute.
          rngs: the stream `params` initializes; `ghost` is kept if the method draws random numbers.
          metadata: of the variables of each name, such as `{"scale": {"sharding_names":
            ("model",)}}`.
        """
        checks.method("Norm", method)
        self._configuration = _Configuration(method)
        self.num_features = num_features
        if checks.depends_on_train(method):
            self.use_running_average = use_running_average
        if checks.is_random(method):
            self.rngs = rngs["ghost"].fork()
        params, state = method.init(jax.random.key(0), num_features)
        self._structure = jax.tree.structure((params, state))
        metadata = metadata or {}

        def fresh(path):
            value = to_dict(method.init(rngs.params(), num_features)[0])
            for name in path:
                value = value[name]
            return value

        variables = _merge(
            _map(
                lambda path, _: nnx.Param(fresh(path), **metadata.get(path[-1], {})),
                to_dict(params),
            ),
            _map(lambda path, a: nnx.BatchStat(a, **metadata.get(path[-1], {})), to_dict(state)),
        )
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
    ) -> Any:
        """Normalizes `x` and, in training, moves the statistics.

        Args:
          x: real array with `num_features` on the feature axis.
          use_running_average: overrides the attribute for this call.
          mask: broadcasts to `x`; positions where it is False do not enter the statistics.
          **inputs: what else the method takes.
        """
        if not (use_running_average is None or isinstance(use_running_average, bool)):
            raise TypeError(
                f"{type(self).__name__}: use_running_average={use_running_average!r} is not "
                "True or False; a mask is given by name."
            )
        evaluate = use_running_average
        if evaluate is None:
            evaluate = getattr(self, "use_running_average", False)
        if evaluate is None:
            raise ValueError(
                f"{type(self).__name__}: use_running_average was given neither at construction "
                "nor at the call."
            )
        structure = self._structure
        params, state = jax.tree.unflatten(structure, range(structure.num_leaves))
        params = self._values(params)
        state = self._values(state)
        key = self.rngs() if not evaluate and checks.is_random(self.method) else None
        how = dict(train=not evaluate, mask=mask, key=key, **inputs)
        y, state = self.method.apply(params, state, x, **how)
        if not evaluate:
            _map(self._move, to_dict(state))
        return y

    def set_view(self, use_running_average: bool | None = None):
        """Used by `nnx.view`.

        Args:
          use_running_average: evaluate with the running statistics; None leaves the attribute
            alone.
        """
        if use_running_average is not None and checks.depends_on_train(self.method):
            self.use_running_average = use_running_average

    @property
    def method(self) -> Any:
        """The method, whose initializers are those that made the parameters."""
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

    def _variable(self, path):
        value = getattr(self, path[0], None)
        for name in path[1:]:
            value = None if value is None else value.get(name)
        return value

    def _move(self, path, value):
        variable: Any = self._variable(path)
        variable.set_value(jax.lax.stop_gradient(value))

    def _values(self, tree, path=()):
        """Parameters or state as the variables are now: optional ones may come and go."""
        if not (isinstance(tree, dict) or hasattr(tree, "_fields")):
            return tree  # no variables at all
        fields = tree if isinstance(tree, dict) else tree._asdict()
        values = {}
        for name, spec in fields.items():
            where = (*path, name)
            part = isinstance(spec, dict | tuple)
            values[name] = self._values(spec, where) if part else self._value(tree, where)
        return values if isinstance(tree, dict) else type(tree)(**values)

    def _value(self, tree, path):
        variable, name = self._variable(path), path[-1]
        if variable is not None:
            return variable[...]
        if name not in getattr(tree, "_field_defaults", ()):
            raise AttributeError(
                f"{type(self).__name__}: {'.'.join(path)} is gone, but {self.method!r} needs it."
            )
        return None


class _Configuration:
    """A method as static metadata of a module: equal if made alike.

    Functions made alike, such as `nnx.initializers.constant(0.1)` twice, are different objects, and
    so modules that hold them would differ, be traced again and not be stacked.
    """

    def __init__(self, method):
        self.method = method

    def __eq__(self, other):
        return isinstance(other, _Configuration) and alike(self.method, other.method)

    def __hash__(self):
        return hash(type(self.method))

    def __repr__(self):
        return repr(self.method)


def _fields(module):
    """Names of the fields of the module's method, which read and set as the module's own."""
    configuration = vars(module).get("_configuration")
    fields = getattr(getattr(configuration, "method", None), "__dataclass_fields__", {})
    return fields.keys() - {"method"}


def _map(function, tree, path=()):
    """`function(path, leaf)` for every leaf of nested dicts."""
    return {
        name: _map(function, value, (*path, name))
        if isinstance(value, dict)
        else function((*path, name), value)
        for name, value in tree.items()
    }


def _merge(a, b):
    both = {name: _merge(a[name], b[name]) for name in a.keys() & b.keys()}
    return {**a, **b, **both}


def _nested(tree):
    return nnx.Dict({k: _nested(v) if isinstance(v, dict) else v for k, v in tree.items()})


def _module(method, *, like_flax=False, mask_second=False):
    """The module class of `method`: it takes the fields of the method and has its documentation."""
    fields = dataclasses.fields(method)
    positional = [f.name for f in fields if not f.kw_only]

    def __init__(self, num_features, *args, use_running_average=False, rngs, **given):
        name = type(self).__name__
        if len(args) > len(positional):
            raise TypeError(
                f"{name}: {len(args)} positional arguments after num_features are too many."
            )
        named = dict(zip(positional, args, strict=False))
        if twice := named.keys() & given.keys():
            raise TypeError(f"{name}: {min(twice)} is given by position and by name.")
        given = {**named, **given}
        metadata = {
            key.removesuffix("_metadata"): given.pop(key)
            for key in list(given)
            if key in ("scale_metadata", "bias_metadata")
        }
        if like_flax:
            given.pop("use_fast_variance", None)
            _check_promotion(name, given.pop("promote_dtype", None))
        Norm.__init__(
            self,
            method(**given),
            num_features,
            use_running_average=use_running_average,
            rngs=rngs,
            metadata=metadata,
        )

    def call_with_mask(self, x, mask=None, **how):
        return Norm.__call__(self, x, mask=mask, **how)

    def body(namespace):
        namespace["__module__"] = __name__
        notes = (NOTE, FLAX_NOTE if like_flax else "")
        namespace["__doc__"] = method.__doc__.rstrip() + "\n" + "".join(notes)
        namespace["__init__"] = __init__
        if mask_second:
            namespace["__call__"] = call_with_mask

    return types.new_class(method.__name__, (Norm,), {}, body)


def _check_promotion(name, promote):
    if promote not in (None, dtypes.promote_dtype):
        raise ValueError(
            f"{name}: promote_dtype={promote!r} is not supported: statistics and arithmetic are in "
            "at least float32, and `dtype` sets the dtype of the output."
        )


BatchNorm = _module(normjax.BatchNorm, like_flax=True)
BatchRenorm = _module(normjax.BatchRenorm)
InputNorm = _module(normjax.InputNorm)
LayerNorm = _module(normjax.LayerNorm, like_flax=True)
RMSNorm = _module(normjax.RMSNorm, like_flax=True, mask_second=True)
GroupNorm = _module(normjax.GroupNorm, like_flax=True)
InstanceNorm = _module(normjax.InstanceNorm, like_flax=True)
Affine = _module(normjax.Affine)
DynamicTanh = _module(normjax.DynamicTanh)
Ghost = _module(normjax.Ghost)
GhostBatchNorm = _module(normjax.GhostBatchNorm)
ExclusiveBatchNorm = _module(normjax.ExclusiveBatchNorm)
EvalNorm = _module(normjax.EvalNorm)
GhostNoise = _module(normjax.GhostNoise)
AnalyticGhostNoise = _module(normjax.AnalyticGhostNoise)
GhostNoiseBatchNorm = _module(normjax.GhostNoiseBatchNorm)
KalmanNorm = _module(normjax.KalmanNorm)
Chain = _module(normjax.Chain)
SpectralBatchNorm = _module(normjax.SpectralBatchNorm)
SpatialSpectralBatchNorm = _module(normjax.SpatialSpectralBatchNorm)

__all__ = [
    "Affine",
    "AnalyticGhostNoise",
    "BatchNorm",
    "BatchRenorm",
    "Chain",
    "DynamicTanh",
    "EvalNorm",
    "ExclusiveBatchNorm",
    "Ghost",
    "GhostBatchNorm",
    "GhostNoise",
    "GhostNoiseBatchNorm",
    "GroupNorm",
    "InputNorm",
    "InstanceNorm",
    "KalmanNorm",
    "LayerNorm",
    "Norm",
    "RMSNorm",
    "SpatialSpectralBatchNorm",
    "SpectralBatchNorm",
]
