"""Normalization by the statistics of everything seen, as for the observations of agents."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from normjax.core import checks, passes, running, seam
from normjax.core.checks import field
from normjax.core.fields import Activation, RunningFields
from normjax.core.method import Normalizer, Traits
from normjax.core.statistics import Moments
from normjax.core.structs import AffineParams, AxisGroups, Key, Running
from normjax.methods import batch


@dataclasses.dataclass(frozen=True)
class _Clip:
    """An activation of what is cut at plus and minus `bound`."""

    bound: float
    activation: Callable[[jax.Array], jax.Array] | None

    def __call__(self, z):
        return passes.activate(self.activation, jnp.clip(z, -self.bound, self.bound))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningNorm(RunningFields):
    """`(x - mean) / sqrt(var + epsilon)` by the statistics of everything seen so far.

    The observation normalization of reinforcement learning: Lee et al., *SimBa*, 2024 (RSNorm),
    https://arxiv.org/abs/2410.09754; Andrychowicz et al., *What Matters in On-Policy Reinforcement
    Learning*, 2020, https://arxiv.org/abs/2006.05990

    Training moves the statistics by the batch first, and normalizes by the moved ones, as Gymnasium
    and Stable-Baselines3 do; evaluation leaves them alone. To act with old statistics and move them
    later, as Brax does, evaluate, then `absorb(state, observe(x))`. The statistics are those of all
    values, merged exactly over batches of any size, environments and devices; they are constants of
    the backward pass.

    Departures: Gymnasium and Stable-Baselines3 start with 1e-4 samples of mean 0 and variance 1.
    Here the first batch replaces these, so that a first batch of one sample becomes zero. SimBa has
    no clip; Brax bounds the deviation from below instead of adding `epsilon`.

    Attributes:
      clip: bound of the absolute value of the output, in front of `activation`; None: no bound.
        Stable-Baselines3 has 10.
      running_average: "pooled", all values alike; for observations that drift, another average of
        `BatchNorm`, with its `momentum`.
      axis_name: mapped axis name(s), such as that of parallel environments, whose values are
        merged. All of them are: there are no `axis_index_groups`.
      axis_index_groups: None.
      epsilon: added to the variance, >= 0.
      use_scale, use_bias: whether `init` makes a scale, and a bias; it makes none by default.
      axis, momentum, scale_init, bias_init, dtype, param_dtype, activation, unbiased_running_var,
        skip_nonfinite: as in `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method = nj.RunningNorm(clip=10.0)
      >>> params, state = method.init(None, 3)
      >>> for observations in (jnp.zeros((1, 3)), jnp.ones((3, 3))):
      ...     y, state = method.apply(params, state, observations, train=True)
      >>> state.mean[0].item(), state.var[0].item()
      (0.75, 0.1875)
    """

    traits: ClassVar[Traits] = Traits(inputs={"weights": "sample"})
    constant_statistics: ClassVar[bool] = True

    clip: float | None = field(None, checks.optional(checks.interval(0)))
    epsilon: float = field(1e-8, checks.interval(0))
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = field(
        "pooled", checks.one_of("exponential", "debiased", "cumulative", "pooled")
    )
    axis_index_groups: AxisGroups = field(
        None, checks.none, hint="The statistics are of all devices."
    )
    use_scale: bool = field(False, checks.flag)
    use_bias: bool = field(False, checks.flag)

    init, observe, evaluation = batch.init, batch.observe, batch.evaluation
    absorb, apply = running.absorb, seam.apply

    def epilogue(self) -> Activation:
        """The clip, then the activation."""
        return self.activation if self.clip is None else _Clip(self.clip, self.activation)

    def coefficients(
        self, params: AffineParams, state: Running, seen: Moments, *, key: Key = None
    ) -> Normalizer:
        """Normalizes by the statistics that those of the batch have moved."""
        moved = self.absorb(state, seen)
        mean, var = passes.as_wide(seen.mean, moved.mean, moved.var)
        return batch.normalizer(self, params, mean, var)
