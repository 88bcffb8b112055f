"""Layer normalization and root-mean-square normalization."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, groups, passes, seam, statistics
from normjax.core.checks import field
from normjax.core.fields import (
    Activation,
    AffineFields,
    ReductionFields,
    ScaleFields,
    SegmentFields,
)
from normjax.core.method import Normalizer, Traits, feature_positions
from normjax.core.statistics import Moments
from normjax.core.structs import AffineParams, Axes, Features, Key, Mask, affine_params, several
from normjax.core.tracing import traced_once
from normjax.core.variance import is_weighted


def init(method: ScaleFields, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
    """What is learned (`param_dtype`) of the shape of the feature axes; no state."""
    return affine_params(method, key, checks.as_features(type(method).__name__, features)), ()


def reduce(method: Any, x: Any, axes: Any, mask: Any, **options: Any) -> Moments:
    """Moments of `x` over `axes`, which stay as size one, and over devices."""
    seen = passes.moments(x, axes, mask=mask, **options)
    if method.axis_name is None:
        return seen
    return statistics.over_devices(seen, method.axis_name, method.axis_index_groups)[0]


SAMPLES: dict[str, Literal["sample", "whole"]] = {"weights": "sample", "segment_ids": "sample"}


def reduction_axes(method: ReductionFields, x: Any) -> tuple[int, ...]:
    """The axes of `x` over which statistics are taken."""
    name, shape = type(method).__name__, jnp.shape(x)
    return checks.as_axes(name, "reduction_axes", method.reduction_axes, shape)


def coefficients(
    method: Any, params: AffineParams, state: tuple[()], seen: Moments, *, key: Key = None
) -> Normalizer:
    """Normalizes by mean and variance."""
    inverse = passes.inverse_deviation(seen.var, method.epsilon)
    return Normalizer(seen.mean, inverse, params.scale, params.bias)


def evaluation(
    method: Any, params: AffineParams, state: tuple[()], x: Any = None, mask: Mask = None
) -> Normalizer:
    """Normalizes `x` by statistics of its own; it cannot be folded into a layer before it."""
    if x is None:
        name = type(method).__name__
        raise ValueError(f"{name}: x=None, but evaluation takes statistics of x: it cannot fold.")
    return method.coefficients(params, state, method.observe(x, mask))


def absorb(method: Any, state: tuple[()], seen: Moments) -> tuple[()]:
    """There is no state."""
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFields(ReductionFields, ScaleFields, SegmentFields):
    """What `LayerNorm` and `RMSNorm` share: all but whether a mean is subtracted."""

    traits: ClassVar[Traits] = Traits(trains=False, inputs={"gate": "sample", **SAMPLES})
    centred: ClassVar[bool] = True

    feature_axes: Axes = field(-1, checks.one_of((), or_else=checks.integers))
    num_groups: int = field(1, checks.positive)
    scale_offset: float = field(0.0, checks.interval())
    cast: Literal["output", "before_scale"] = field(
        "output", checks.one_of("output", "before_scale")
    )
    gate_activation: Activation = field(jax.nn.silu, checks.optional(checks.activation))
    gate_place: Literal["before", "after"] = field("after", checks.one_of("before", "after"))

    evaluation, absorb = evaluation, absorb

    def __post_init__(self):
        super().__post_init__()
        if self.num_segments is not None and (self.num_groups > 1 or self.cast != "output"):
            raise ValueError(
                f"{type(self).__name__}: num_segments={self.num_segments} needs num_groups=1 and "
                f"cast='output', not {self.num_groups} and {self.cast!r}."
            )
        row = several(self.reduction_axes) == (-1,) and several(self.feature_axes) in ((-1,), ())
        if self.num_groups > 1 and not row:
            axes = f"reduction_axes={self.reduction_axes} and feature_axes={self.feature_axes}"
            raise ValueError(
                f"{type(self).__name__}: num_groups={self.num_groups} with {axes}: the last axis "
                "is divided into groups, and must be the one that is reduced and has the scale."
            )

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """What is learned (`param_dtype`) of the shape of the feature axes; no state."""
        name = type(self).__name__
        shape = () if self.feature_axes == () else checks.as_features(name, features)
        params = affine_params(self, key, shape)
        if params.scale is not None and self.scale_init is jax.nn.initializers.ones:
            params = params._replace(scale=params.scale - self.scale_offset)
        return params, ()

    def observe(
        self, x: Any, mask: Mask = None, weights: Any = None, segment_ids: Any = None
    ) -> Moments:
        """Moments over the reduced axes, which stay as size one; of groups, for every feature.

        Those of `RMSNorm` are mean squares, as variances about zero. Those of segments lie on the
        first reduced axis that has no scale.
        """
        x, mask = passes.inputs(self, x, mask, weights, segment_ids)
        axes, how = reduction_axes(self, x), dict[str, Any](centred=self.centred)
        if self.num_groups > 1:
            axes, how["channel_groups"] = (), self._groups(x.shape)
        return reduce(self, x, axes, mask, **how)

    def segment_axis(self, x: Any) -> int:
        """The axis of `x` along which the statistics of segments lie."""
        at, axes = feature_positions(self, x.shape), reduction_axes(self, x)
        return checks.segment_axis(self, [i for i in axes if i not in at], x.shape)

    def coefficients(
        self, params: AffineParams, state: tuple[()], seen: Moments, *, key: Key = None
    ) -> Normalizer:
        """Normalizes by mean and variance, or by the root of the mean square."""
        inverse, scale = passes.inverse_deviation(seen.var, self.epsilon), params.scale
        if scale is not None and self.scale_offset:
            scale = scale.astype(seen.var.dtype) + self.scale_offset
        return Normalizer(seen.mean if self.centred else None, inverse, scale, params.bias)

    def apply(
        self,
        params: AffineParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
        gate: jax.Array | None = None,
        **counting: Any,
    ) -> tuple[jax.Array, tuple[()]]:
        """Normalizes `x`; `train` and `key` change nothing.

        `gate`, of the shape of `x`, multiplies it or the output, as `gate_place` says. See
        `BatchNorm.apply` for `mask`, and for `counting`: `weights` and `segment_ids`.
        """
        given: Any = dict(train=train, mask=mask, key=key, **counting)
        if gate is None and self.num_groups == 1 and self.cast == "output":
            return seam.apply(self, params, state, x, **given)
        if gate is not None:
            given["gate"] = gate
        return _apply(self, params, state, x, **given)

    def _groups(self, shape):
        if shape[-1] % self.num_groups:
            given = f"num_groups={self.num_groups} does not divide {shape[-1]} features"
            raise ValueError(f"{type(self).__name__}: {given}.")
        return self.num_groups


@traced_once
def _apply(
    self, params, state, x, *, train, mask=None, weights=None, segment_ids=None, key=None, gate=None
):
    """`apply` with all options, of which segments go with no other. Keeps `x` and the gate."""
    if segment_ids is not None:
        raise ValueError(f"{type(self).__name__}: segment_ids with a gate.")
    x, mask = passes.inputs(self, x, mask, weights, segment_ids)
    at, axes = seam.require_variables(self, params, state, x), reduction_axes(self, x)
    if gate is not None:
        valid = mask > 0 if is_weighted(mask) else mask
        gate, _ = passes.inputs(self, _as_gate(self, gate, x), valid)
    whole, number = passes.value(x), self._groups(x.shape) if self.num_groups > 1 else 1
    if number > 1:  # of a row: those of an axis
        last = x.ndim - 1
        x, gate = jax.tree.map(lambda a: groups.split(a, last, number), (x, gate))
        if mask is not None:
            mask = mask[..., None] if mask.shape[last] == 1 else groups.split(mask, last, number)
        if at:
            params, at = (
                jax.tree.map(lambda a: groups.split(a, 0, number), params),
                (last, last + 1),
            )
        axes = (last + 1,)

    def normalizer(params, x):
        seen = reduce(self, x, axes, mask, centred=self.centred)
        return self.coefficients(params, state, seen)

    def before(params, x, gate):
        gated = passes.carried(passes.widen(x) * _gate(self, gate))
        return _output(self, gated, normalizer(params, gated), at, whole.dtype, dtype)

    dtype = passes.output_dtype(self.dtype, x)
    if gate is not None and self.gate_place == "before":
        y = jax.checkpoint(before)(params, passes.value(x), passes.value(gate))
    else:
        y = _output(self, x, normalizer(params, x), at, whole.dtype, dtype, gate)
    return y if number == 1 else groups.join(y, whole.ndim - 1, like=whole), state


def _as_gate(method, gate, x):
    name = type(method).__name__
    gate, work = checks.as_real(name, gate), passes.wide(x.dtype)
    if gate.shape != x.shape:
        raise ValueError(f"{name}: a gate of shape {gate.shape} for an input of shape {x.shape}.")
    return gate if passes.wide(gate.dtype) == work else gate.astype(work)


def _gate(method, gate):
    return passes.activate(method.gate_activation, passes.widen(gate))


def _output(method, x, n, at, narrow, dtype, gate=None):
    """The output in `dtype` for an input that was given in the dtype `narrow`.

    What is cast before the scale has the derivatives of what is not.
    """
    activation, work, kind = method.epilogue(), passes.wide(x.dtype), jnp.finfo(narrow)
    how: Any = dict(activation=activation)
    if gate is not None:
        how["gate"] = gate, method.gate_activation
    if method.cast == "output" or kind.bits >= jnp.finfo(work).bits:
        return passes.apply(x, n, at, dtype=dtype, **how)
    # Not `astype`, there and back: XLA leaves such a pair out.
    cast = lambda a: lax.reduce_precision(a.astype(work), kind.nexp, kind.nmant)
    z = passes.widen(passes.value(x))
    z = cast((z if n.mean is None else z - n.mean) * n.inverse)
    z = z if n.scale is None else z * cast(passes.lift(n.scale, at, x.ndim))
    z = z if n.bias is None else z + cast(passes.lift(n.bias, at, x.ndim))
    rounded = passes.activate(activation, cast(z))
    rounded = rounded if gate is None else rounded * _gate(method, passes.value(gate))
    exact = passes.apply(x, n, at, dtype=work, **how)
    return (exact + lax.stop_gradient(rounded - exact)).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm(RowFields, AffineFields):
    """Layer normalization: `(x - mean) / sqrt(var + epsilon) * scale + bias` within each sample.

    Ba, Kiros & Hinton, *Layer Normalization*, 2016, section 3, https://arxiv.org/abs/1607.06450

    As in Flax, statistics are over the last axis by default, so that every position has its own;
    the paper's convolutional form is `reduction_axes=(1, 2, 3)`. No state. The output has the dtype
    of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      epsilon, dtype, param_dtype, use_scale, use_bias, scale_init, bias_init, activation: as in
        `BatchNorm`.
      reduction_axes: axes over which statistics are taken.
      feature_axes: axes with their own scale and bias; (): one number for all.
      num_groups: into how many groups of consecutive features to divide the last axis; each has
        statistics of its own. It is then the axis that is reduced and has the scale.
      scale_offset: added to the learned scale, in at least float32: 1 for one that is learned
        around zero, as in Gemma. The default `scale_init` then starts the parameter at
        `1 - scale_offset`; any other is the parameter's own.
      cast: "output": all in at least float32, rounded once. "before_scale", as in Llama: what is
        normalized is rounded to the dtype of the input, and multiplied by the scale in that dtype;
        derivatives are those of the formula.
      gate_activation: function of `gate`, an input of `apply`; None: the gate itself.
      gate_place: whether the gate multiplies the input ("before") or the output, behind
        `activation` ("after"). `observe` is of the input without a gate.
      num_segments: largest number of segments, for the input `segment_ids` of `apply`: positions
        of the reduced axes share statistics with those of their segment alone, such as a document
        of a packed row, or, with `reduction_axes=0`, a graph among all nodes. Without a gate, with
        one group, and with `cast="output"`.
      axis_name: mapped axis name(s) over which the reduced axes are divided.
      axis_index_groups: groups of device indices along `axis_name` that share statistics.

    Raises:
      ValueError, TypeError: as in `BatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.LayerNorm()
      >>> y, _ = method.apply(*method.init(None, 16), jax.numpy.ones((2, 5, 16)), train=True)
    """

    def check_training(self, x: Any) -> None:
        """ValueError for statistics of single values."""
        shape = jnp.shape(x)
        instead = "take statistics over more axes (reduction_axes), or normalize another axis"
        sizes = [shape[i] for i in reduction_axes(self, x)]
        if self.num_groups > 1:
            sizes, instead = [shape[-1] // self._groups(shape)], "take fewer groups"
        checks.require_several_values(self, sizes, shape, instead)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm(RowFields):
    """Root-mean-square normalization: `x / sqrt(mean(x**2) + epsilon) * scale`.

    Zhang & Sennrich, *Root Mean Square Layer Normalization*, 2019, equation 4,
    https://arxiv.org/abs/1910.07467

    The paper has no epsilon. Computed in at least float32 and rounded once to the dtype of the
    input (integers: float32) or to `dtype`. No state.

    The forms of language models: Llama `cast="before_scale"`; Gemma and Qwen3-Next
    `scale_offset=1`; Mamba-2 `gate_place="before"` with `num_groups` and `gate=`; the gated norm of
    Qwen3-Next `cast="before_scale"` with `gate=`; the scale norm of Nguyen & Salazar
    `feature_axes=()`.

    Attributes:
      epsilon: added to the mean square, >= 0.
      use_scale, scale_init, dtype, param_dtype: as in `LayerNorm`; there is no bias.
      reduction_axes: axes over which squares are averaged.
      feature_axes, num_groups, scale_offset, cast, gate_activation, gate_place, num_segments,
        axis_name, axis_index_groups, activation: as in `LayerNorm`.

    Raises:
      ValueError, TypeError: as in `LayerNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.RMSNorm()
      >>> y, _ = method.apply(*method.init(None, 4), jax.numpy.full((2, 4), 3.0), train=True)
      >>> print(y[0].round(3))
      [1. 1. 1. 1.]
    """

    centred: ClassVar[bool] = False
