"""Every method as a Flax Linen module.

One module serves all methods: it keeps parameters in the collection `params` and running statistics
in `batch_stats`, and draws random numbers from the stream `ghost`. The classes with the names of
Flax's own have Flax's fields in Flax's order, Flax's call signature and Flax's variable tree.
"""

import dataclasses
import types
from typing import Any

import jax
from flax import linen as nn

import normjax
from normjax.core import checks
from normjax.core.structs import from_dict, to_dict

FLAX_FIELDS = {"use_fast_variance": True, "force_float32_reductions": True}
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


class _Front(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None, **inputs):
        """Normalizes `x`.

        Args:
          x: real array; its feature axes set the shapes of the parameters.
          use_running_average: evaluate with the running statistics instead of training; may be a
            field instead. Methods that treat training and evaluation alike need neither.
          mask: broadcasts to `x`; positions where it is False do not enter the statistics.
          **inputs: what else the method takes.

        Returns:
          The method's output. While the module is being initialized this is the evaluation's, so
          that no mapped axis is needed, and the statistics stay at their initial values.
        """
        method = self._method()
        evaluate = bool(use_running_average)
        if checks.depends_on_train(method):
            field = getattr(self, "use_running_average", None)
            evaluate = nn.merge_param("use_running_average", field, use_running_average)
        train = not evaluate and not self.is_initializing()
        features = _features(method, x)

        def initial(key, part, name):
            return to_dict(method.init(key, features)[part])[name]

        key = jax.random.key(0)
        params, state = jax.eval_shape(lambda: method.init(key, features))
        made = {name: self.param(name, initial, 0, name) for name in to_dict(params)}
        cells = {
            name: self.variable("batch_stats", name, initial, key, 1, name)
            for name in to_dict(state)
        }
        params = from_dict(nn.unbox(params), made)
        state = from_dict(state, {name: cell.value for name, cell in cells.items()})
        key = self.make_rng("ghost") if train and checks.is_random(method) else None
        y, state = method.apply(params, state, x, train=train, mask=mask, key=key, **inputs)
        if train:
            for name, value in to_dict(state).items():
                cells[name].value = value
        return y

    def _method(self):
        raise TypeError("Use normjax.linen.Norm(method) or a class with the name of a method.")


class Norm(_Front):
    """Any method as a module, such as `Norm(nj.chain(nj.LayerNorm(), nj.Affine()))`.

    Attributes:
      method: the method, an object with `init` and `apply`.
      use_running_average: evaluate with the running statistics instead of training; may be given
        per call.

    Raises:
      ValueError: if `method` is none, or if nobody says whether to train where that matters.

    Example:
      >>> import jax, normjax as nj, normjax.linen
      >>> norm = normjax.linen.Norm(nj.Ghost(nj.BatchNorm(), groups=2))
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> variables = norm.init(jax.random.key(1), x, use_running_average=False)
      >>> y, new = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> sorted(new["batch_stats"])
      ['mean', 'var']
    """

    method: Any
    use_running_average: bool | None = None

    def _method(self):
        checks.method("Norm", self.method)
        return self.method


def _features(method, x):
    at = checks.feature_axes(method)
    shape = jax.numpy.shape(x)
    axes = checks.axes(type(method).__name__, "axis", at, shape)
    sizes = tuple(shape[i] for i in axes)
    return sizes if isinstance(at, tuple) else sizes[0]


def _module(method, *, like_flax=False):
    """The module class of `method`, with its documentation and fields, and Flax's own."""
    by_position_first = sorted(dataclasses.fields(method), key=lambda f: f.kw_only is True)
    fields = {f.name: (f.type, f.default) for f in by_position_first}
    switch = {}
    if checks.depends_on_train(method) is not False:
        switch["use_running_average"] = (bool | None, None)
    declared = {**fields, **switch}
    if like_flax:
        flax_fields = {name: (bool, default) for name, default in FLAX_FIELDS.items()}
        last = list(fields).index("axis_index_groups") + 1
        ours = dict(list(fields.items())[last:])
        declared = {**switch, **dict(list(fields.items())[:last]), **flax_fields, **ours}

    def body(namespace):
        namespace["__module__"] = __name__
        notes = (NOTE, SWITCH_NOTE if switch else "", FLAX_NOTE if like_flax else "")
        namespace["__doc__"] = method.__doc__.rstrip() + "\n" + "".join(notes)
        namespace["__annotations__"] = {name: kind for name, (kind, _) in declared.items()}
        for name, (_, default) in declared.items():
            if default is not dataclasses.MISSING:
                namespace[name] = default
        namespace["_method"] = lambda self: method(**{name: getattr(self, name) for name in fields})

    return types.new_class(method.__name__, (_Front,), {}, body)


BatchNorm = _module(normjax.BatchNorm, like_flax=True)
BatchRenorm = _module(normjax.BatchRenorm)
InputNorm = _module(normjax.InputNorm)
LayerNorm = _module(normjax.LayerNorm, like_flax=True)
RMSNorm = _module(normjax.RMSNorm, like_flax=True)
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
