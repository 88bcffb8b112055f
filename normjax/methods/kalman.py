"""Kalman normalization: batch statistics fused with those that the layer before predicts."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax import propagate
from normjax.core import checks, passes, running, seam, statistics
from normjax.core.checks import field
from normjax.core.fields import COUNT
from normjax.core.method import Normalizer, Traits
from normjax.core.sharding import place, spec
from normjax.core.statistics import Moments, Parted
from normjax.core.structs import Features, Key, Mask, Pool, Running, affine_params
from normjax.core.tracing import traced_once
from normjax.methods import batch
from normjax.methods.batch import BatchFields


class KalmanParams(NamedTuple):
    """Scale and bias, and what a `KalmanNorm` learns of its filter, or None.

    Wang, Peng, Luo, Wang & Lin, *Kalman Normalization*, 2018, https://arxiv.org/abs/1802.03133

    Example:
      >>> import normjax as nj
      >>> params, _ = nj.KalmanNorm(gain="learned").init(None, 3)
      >>> params.gain_logit.shape, params.transition_matrix
      ((), None)
    """

    scale: jax.Array | None = None  # [features]
    bias: jax.Array | None = None  # [features]
    gain_logit: jax.Array | None = None  # [] or [features]
    transition_matrix: jax.Array | None = None  # [prior_features, features]
    transition_log_noise: jax.Array | None = None  # [features]


class KalmanRunning(NamedTuple):
    """Running statistics, and the tracked errors of the prediction where the gain needs them.

    Wang, Peng, Luo, Wang & Lin, *Kalman Normalization*, 2018, https://arxiv.org/abs/1802.03133

    Example:
      >>> import normjax as nj
      >>> _, state = nj.KalmanNorm(gain="computed").init(None, 3)
      >>> state.mean_error.tolist(), state.count
      ([1.0, 1.0, 1.0], None)
    """

    mean: jax.Array  # f32[features]
    var: jax.Array  # f32[features]
    count: jax.Array | None = None  # f32[], of updates
    mean_error: jax.Array | None = None  # f32[features], in units of the predicted variance
    var_error: jax.Array | None = None  # f32[features], of the logarithm
    pool: Pool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KalmanNorm(BatchFields):
    """Batch normalization with statistics fused from the batch and a prediction.

    Wang, Peng, Luo, Wang & Lin, *Kalman Normalization*, 2018, https://arxiv.org/abs/1802.03133, and
    its public implementation (wanggrun/Kalman-Normalization).

    Small batches give noisy statistics. The layers before predict the same statistics without that
    noise, up to a bias: `prior`, the moments of this layer's input, from `normjax.propagate`. With
    the weight q of the batch, training normalizes by the moments of a mixture of both: `mean =
    (1 - q) * prior mean + q * batch mean` and `var = (1 - q) * prior var + q * batch var +
    q * (1 - q) * (batch mean - prior mean)^2`. Gradients flow through both. Without a prior, as in
    a first layer, and in evaluation, with running averages of the fused statistics, this is
    `BatchNorm`. `posterior` gives the moments of the output for `normjax.propagate`.

    Departures. The public implementation hands on the fused statistics, from before normalization
    and affine (`fused`), although the next layer sees normalized values of mean bias and variance
    scale^2 (`posterior`). It calls 1 - q `p_rate` (0.9 with two samples, 0.05 with 128), ignores a
    prediction whose variances are too large (`guard=100`), simulates micro-batches by parts of the
    batch and moves its running statistics by the first of them: `Ghost(KalmanNorm(...), groups=N,
    running="first")`, where here every part has a guard of its own. There the layers without a
    prior store (`unbiased_running_var`) and hand on unbiased variances.

    A computed gain is that of a Kalman filter. The squared error of the predicted mean, in units of
    the predicted variance, and that of the predicted log-variance are averaged over the steps.
    Above what sampling n independent normal values explains (1 / n; for the log-variance the
    moments of a log chi-squared number) they are the variances tau^2 of the prediction, and the
    gains of mean and variance are tau^2 / (tau^2 + noise); q is that of the mean in the term
    q * (1 - q) * gap^2. No gradient flows through these gains.

    Attributes:
      gain: weight of the batch, in [0, 1]; "learned", the sigmoid of the parameter `gain_logit`; or
        "computed", which adds `mean_error` and `var_error` to the state.
      gain_per: "layer", or "channel" for a gain of each feature; for a learned or computed gain.
      initial_gain: where a learned gain starts, in (0, 1).
      effective_size: for a computed gain: how many independent values a batch is worth; None: as
        many as it has valid ones, too many where neighbours on a map are alike.
      guard: ignore the prior in a step in which the mean of prior var / batch var over features is
        not below this; None: never.
      require_prior: whether training without a prior is an error.
      transition: None: the prior is for this layer's input. "learned": it is the posterior of the
        layer before, which a learned matrix A and a learned diagonal noise R take here: mean A m,
        variance A^2 v + R (the state space of the paper; its implementation has neither).
      prior_features: number of features of the prior, for and only for a learned transition.
      transition_init: initializer of A, called with (key, (prior_features, features), param_dtype).
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: as in `BatchNorm`.

    Raises:
      ValueError: for a field outside its range or fields that contradict each other; in `apply`,
        for a prior that is missing or does not fit, and as in `BatchNorm`.
      TypeError: in `apply`, for a prior that is no `Moments`, and as in `BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> first, second = nj.KalmanNorm(activation=jax.nn.relu), nj.KalmanNorm(gain=0.3)
      >>> params, state = first.init(None, 4)
      >>> kernel = jax.random.normal(jax.random.key(0), (4, 3))
      >>> y, state = first.apply(params, state, jnp.eye(4), train=True)
      >>> prior = nj.propagate.dense(first.posterior(params), kernel)
      >>> z, _ = second.apply(*second.init(None, 3), y @ kernel, train=True, prior=prior)
    """

    traits: ClassVar[Traits] = Traits(inputs={"prior": "whole"})

    gain: float | Literal["learned", "computed"] = field(
        0.5, checks.one_of("learned", "computed", or_else=checks.interval(0, 1))
    )
    gain_per: Literal["layer", "channel"] = field("layer", checks.one_of("layer", "channel"))
    initial_gain: float = field(0.5, checks.interval(0, 1, open=True))
    effective_size: float | None = field(None, checks.optional(checks.interval(1)))
    guard: float | None = field(None, checks.optional(checks.interval(0, open=True)))
    require_prior: bool = field(False, checks.flag)
    transition: str | None = field(None, checks.one_of(None, "learned"))
    prior_features: int | None = field(None, COUNT)
    transition_init: Callable[..., Any] = field(
        jax.nn.initializers.lecun_normal(), checks.initializer
    )

    observe, evaluation = batch.observe, batch.evaluation

    def __post_init__(self):
        super().__post_init__()
        if (self.transition is None) != (self.prior_features is None):
            given = f"transition={self.transition!r} and prior_features={self.prior_features}"
            hint = "give both or neither; prior_features are those of the layer before."
            raise ValueError(f"KalmanNorm: {given}: {hint}")
        if self.effective_size is not None and self.gain != "computed":
            given = f"gain={self.gain!r} and effective_size={self.effective_size}"
            raise ValueError(f"KalmanNorm: {given}, which is for gain='computed'.")

    def init(self, key: Key, features: Features) -> tuple[KalmanParams, KalmanRunning]:
        """Parameters (`param_dtype`), running mean 0, variance 1, errors 1 (float32)."""
        shape = checks.as_features("KalmanNorm", features)
        scale, bias = affine_params(self, key, shape)
        logit = matrix = noise = None
        if self.gain == "learned":
            start = jax.scipy.special.logit(jnp.asarray(self.initial_gain, self.param_dtype))
            logit = jnp.broadcast_to(start, shape if self.gain_per == "channel" else ())
        if self.transition is not None:
            if len(shape) > 1:
                raise ValueError(
                    f"KalmanNorm: a learned transition is for one feature axis, not for {shape}."
                )
            key = None if key is None else jax.random.fold_in(key, 2)
            matrix = self.transition_init(key, (self.prior_features, *shape), self.param_dtype)
            noise = jnp.zeros(shape, self.param_dtype)
        mean, var, count, pool = running.init(self, shape)
        errors = (jnp.ones(shape, jnp.float32),) * 2 if self.gain == "computed" else (None, None)
        params = KalmanParams(scale, bias, logit, matrix, noise)
        return params, KalmanRunning(mean, var, count, *errors, pool=pool)

    def check_training(self, x: Any) -> None:
        """With a prior any number of values will do; `apply` checks the rest."""

    @traced_once
    def apply(
        self,
        params: KalmanParams,
        state: KalmanRunning,
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
        prior: Moments | None = None,
    ) -> tuple[jax.Array, KalmanRunning]:
        """Normalizes `x` with fused statistics (`train=True`) or the running ones.

        As in `BatchNorm.apply`, with `prior`, the predicted moments of `x`, [features], or with a
        learned transition those of the layer before. Evaluation does not use it.
        """
        if not train:
            return seam.evaluate(self, params, state, x, mask), state
        if prior is None:
            if self.require_prior:
                raise ValueError(
                    "KalmanNorm: prior=None, but require_prior=True: give the moments that "
                    "normjax.propagate predicts for this input."
                )
            super().check_training(x)
        x, mask = passes.inputs(self, x, mask)
        at = seam.require_variables(self, params, state, x)
        fused, errors = self._fuse_parts(params, state, self.observe(x, mask), prior)
        normalizer = batch.normalizer(self, params, fused.mean, fused.var)
        y = passes.apply(x, normalizer, at, activation=self.activation, dtype=self.dtype)
        return y, self._absorb(state, fused, errors)

    def coefficients(
        self, params: Any, state: Any, seen: Any, *, key: Key = None, prior: Moments | None = None
    ) -> Normalizer:
        """Normalizes by the fused statistics."""
        fused = self.fused(params, state, seen, prior=prior)
        return batch.normalizer(self, params, fused.mean, fused.var)

    def absorb(self, state: KalmanRunning, seen: Any) -> KalmanRunning:
        """The state moved by statistics of a batch without a prior."""
        return self._absorb(state, seen, None)

    def posterior(self, params: KalmanParams, state: KalmanRunning | None = None) -> Moments:
        """Moments of the output: mean bias and variance scale^2, taken through the activation.

        Without scale and bias `state` says how many features there are.
        """
        given = [a for a in (params.scale, params.bias) if a is not None]
        if not given and state is None:
            raise ValueError("KalmanNorm: without scale and bias, give the state.")
        like = passes.widen(jnp.zeros_like(given[0] if state is None else state.mean))
        scale = like + 1 if params.scale is None else params.scale.astype(like.dtype)
        bias = like if params.bias is None else params.bias.astype(like.dtype)
        output = propagate.prediction(bias, jnp.square(scale))
        return propagate.activation(output, self.activation)

    def fused(
        self, params: KalmanParams, state: KalmanRunning, seen: Any, *, prior: Moments | None = None
    ) -> Moments:
        """Moments that training normalizes by, of what `observe` saw and of the prior."""
        return statistics.whole(self._fuse_parts(params, state, seen, prior)[0])

    def _fuse_parts(self, params, state, seen, prior):
        """Fused moments of the batch, and of groups of devices, with the errors to absorb."""
        prior = None if prior is None else self._prior(prior, params, seen)
        fuse = lambda moments: self._fuse(params, state, moments, prior)
        if not isinstance(seen, Parted):
            return fuse(seen)
        parts, errors = jax.vmap(fuse)(seen.parts)
        return Parted(*fuse(statistics.whole(seen))[0], parts=parts), errors

    def _prior(self, prior, params, seen):
        """Predicted mean and variance [features], as exact and sharded as what was seen."""
        if not isinstance(prior, Moments):
            hint = f"{type(prior).__name__}, not Moments: make one by normjax.propagate."
            raise TypeError(f"KalmanNorm: the prior is {hint}")
        if self.transition is not None:
            prior = propagate.dense(prior, params.transition_matrix)
            noise = jnp.exp(params.transition_log_noise.astype(prior.var.dtype))
            prior = prior._replace(var=prior.var + noise)
        mean, var = (jnp.asarray(a).astype(seen.mean.dtype) for a in prior[1:])
        if not mean.shape == var.shape == seen.mean.shape:
            raise ValueError(
                f"KalmanNorm: a prior with a mean of shape {mean.shape} and a variance of shape "
                f"{var.shape}, but the input has features {seen.mean.shape}."
            )
        return tuple(place(a, spec(seen.mean), like=seen.mean) for a in (mean, var))

    def _fuse(self, params, state, seen, prior):
        """Fused moments, and the squared errors of the prediction of mean and log-variance."""
        if prior is None:
            return seen, None
        (mean, var), tracked = prior, seen.count
        if self.guard is not None:
            used = lax.stop_gradient(jnp.mean(var / seen.var)) < self.guard
            mean, var = jnp.where(used, mean, seen.mean), jnp.where(used, var, seen.var)
            tracked = tracked * used.astype(tracked.dtype)
        gap = mean - seen.mean
        sampled = (seen.count > 0).astype(gap.dtype)  # without a sample, only the prediction
        q, p = (gain * sampled for gain in self._gains(params, state, seen))
        fused = Moments(
            seen.count,
            seen.mean + (1 - q) * gap,
            seen.var + (1 - p) * (var - seen.var) + q * (1 - q) * jnp.square(gap),
        )
        if self.gain != "computed":
            return fused, None
        steady = var + self.epsilon
        errors = jnp.square(gap) / steady, jnp.square(jnp.log((seen.var + self.epsilon) / steady))
        return fused, Moments(tracked, *errors)

    def _gains(self, params, state, seen):
        """Weights of the batch's mean and of its variance."""
        dtype = seen.mean.dtype
        if self.gain == "learned":
            return (jax.nn.sigmoid(params.gain_logit.astype(dtype)),) * 2
        if self.gain != "computed":
            return (jnp.asarray(self.gain, dtype),) * 2
        size = seen.count if self.effective_size is None else self.effective_size
        size = jnp.maximum(jnp.asarray(size, dtype), 1)
        half = jnp.maximum(size - 1, 1) / 2
        spread = jax.scipy.special.polygamma(1, half)
        offset = jax.scipy.special.digamma(half) - jnp.log(size / 2)

        def weigh(error, noise):
            error = error if self.gain_per == "channel" else jnp.mean(error)
            excess = jnp.maximum(error.astype(dtype) - noise, 0)
            return lax.stop_gradient(excess / (excess + noise))

        log_noise = spread + jnp.square(offset)
        return weigh(state.mean_error, 1 / size), weigh(state.var_error, log_noise)

    def _absorb(self, state, fused, errors):
        """The state after a batch; by the mean over groups of devices if there are any."""
        if isinstance(fused, Parted):
            each = jax.vmap(lambda *part: self._absorb(state, *part))(fused.parts, errors)
            return running.average_filled(state, each, running.filled(fused.parts))
        old = Running(state.mean, state.var, state.count, state.pool)
        mean, var, count, pool = running.absorb(self, old, fused)
        kept = state.mean_error, state.var_error
        if errors is not None:
            errors, valid = running.measured(self, errors, state.mean)
            keep = running.momentum_at(self, state.count, state.mean.dtype)
            kept = running.blend(keep, kept, errors[1:], valid)
        return KalmanRunning(mean, var, count, *kept, pool=pool)
