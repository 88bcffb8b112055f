"""Fields that methods share, with their rules: bases that do little but check them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from normjax.core import checks
from normjax.core.checks import field
from normjax.core.structs import Axes, AxisGroups, AxisName

Activation = Callable[[jax.Array], jax.Array] | None
Initializer = Callable[..., Any]
Schedule = float | Callable[[Any], Any]
DTYPE, COUNT = checks.optional(checks.floating), checks.optional(checks.positive)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """A frozen configuration whose fields are static and have rules."""

    def __post_init__(self):
        checks.configure(self)

    def check_training(self, x: Any) -> None:
        """ValueError for an input `x` of which training would make nothing; none by default."""

    def check_inputs(self, *, weights: Any = None, **inputs: Any) -> None:
        """ValueError for values of further inputs that do not fit, where they are known."""
        checks.require_weights(type(self).__name__, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisFields(Configuration):
    """The feature axis, or several: see `BatchNorm`."""

    axis: Axes = field(-1, checks.integers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleFields(Configuration):
    """The scale, its initializer, and dtypes of output and parameters."""

    dtype: Any = field(None, DTYPE)
    param_dtype: Any = field(jnp.float32, checks.floating)
    use_scale: bool = field(True, checks.flag)
    scale_init: Initializer = field(jax.nn.initializers.ones, checks.initializer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AffineFields(ScaleFields):
    """Scale and bias, their initializers, and dtypes."""

    use_bias: bool = field(True, checks.flag)
    bias_init: Initializer = field(jax.nn.initializers.zeros, checks.initializer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationFields(Configuration):
    """A pointwise function of the output, taken inside of the layer."""

    activation: Activation = field(None, checks.optional(checks.activation))

    def epilogue(self) -> Activation:
        """What is taken of the output inside of the layer."""
        return self.activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsFields(ActivationFields):
    """What is added to the variance, and over which devices statistics are taken."""

    epsilon: float = field(1e-6, checks.interval(0))
    axis_name: AxisName = field(None, checks.optional(checks.axis_name))
    axis_index_groups: AxisGroups = field(None, checks.optional(checks.axis_index_groups))

    def __post_init__(self):
        super().__post_init__()
        if self.axis_index_groups is not None and self.axis_name is None:
            name = type(self).__name__
            raise ValueError(f"{name}: axis_index_groups needs the axis_name that it divides.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReductionFields(StatisticsFields):
    """Over which axes statistics are taken, and which have a scale of their own."""

    reduction_axes: Axes = field(-1, checks.integers)
    feature_axes: Axes = field(-1, checks.integers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentFields(Configuration):
    """How many segments an input may have whose positions share statistics."""

    num_segments: int | None = field(None, COUNT)

    def check_inputs(self, *, segment_ids: Any = None, **inputs: Any) -> None:
        """An error for ids of segments that there are none of, where they are known."""
        checks.require_segment_ids(type(self).__name__, segment_ids, self.num_segments)
        super().check_inputs(**inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningFields(StatisticsFields, AffineFields, AxisFields):
    """How running statistics of features move: see `core.running`."""

    epsilon: float = field(1e-5, checks.interval(0))
    momentum: Schedule = field(
        0.99,
        checks.interval(0, 1),
        schedule=True,
        hint="It weighs the old statistics; what PyTorch calls momentum 0.1 is 0.9.",
    )
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = field(
        "exponential", checks.one_of("exponential", "debiased", "cumulative", "pooled")
    )
    unbiased_running_var: bool = field(False, checks.flag)
    skip_nonfinite: bool = field(False, checks.flag)

    def __post_init__(self):
        super().__post_init__()
        average, wrong = f"running_average={self.running_average!r}", None
        if callable(self.momentum) and self.running_average != "exponential":
            wrong = "has weights of its own: a schedule of momentum is for 'exponential'."
        elif self.unbiased_running_var and self.running_average == "pooled":
            wrong = "stores population variances: leave unbiased_running_var False."
        if wrong:
            raise ValueError(f"{type(self).__name__}: {average} {wrong}")
