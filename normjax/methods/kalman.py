"""Kalman normalization: batch statistics fused with those that the layer before predicts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax import propagate
from normjax.core import checks, groups, passes, running, sync
from normjax.core.sharding import align, place, spec
from normjax.core.structs import (
    AffineParams,
    Features,
    Key,
    Moments,
    Running,
    affine_params,
)
from normjax.core.tracing import traced_once
from normjax.methods.batch import BatchNorm


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
    count: jax.Array | None = None  # f32[]
    mean_error: jax.Array | None = None  # f32[features], in units of the predicted variance
    var_error: jax.Array | None = None  # f32[features], of the logarithm


class _Statistics(NamedTuple):
    """Moments of the batch or of its groups, with the prediction if there is one."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array
    prior_mean: jax.Array | None = None
    prior_var: jax.Array | None = None

    def moments(self):
        return Moments(self.count, self.mean, self.var)


_LECUN = jax.nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KalmanNorm(BatchNorm):
    """Batch normalization with statistics fused from the batch and a prediction.

    Wang, Peng, Luo, Wang & Lin, *Kalman Normalization*, 2018, https://arxiv.org/abs/1802.03133, and
    its public implementation (wanggrun/Kalman-Normalization).

    Small batches give noisy statistics. The layers before predict the same statistics without that
    noise, up to a bias: `prior`, the moments of the input of this layer, comes from
    `normjax.propagate`. With the weight q of the batch, training normalizes by `mean = (1 - q) *
    prior mean + q * batch mean` and `var = (1 - q) * prior var + q * batch var + q * (1 - q) *
    (batch mean - prior mean)^2`, which is the variance of a mixture of both. q = 1 is batch
    normalization, q = 0 uses the prediction alone. Gradients flow through both. Without a prior, as
    in a first layer, and in evaluation, with running averages of the fused statistics, this is
    `BatchNorm`. The output is a pair: y, and the `posterior`, the moments of y that
    `normjax.propagate` takes to the next layer.

    Departures. The public implementation hands on the fused statistics, from before normalization
    and affine (`posterior="fused"`), although the next layer sees normalized values of mean bias
    and variance scale^2: the posterior here. It calls 1 - q `p_rate` (0.9 with two samples, 0.05
    with 128), ignores a prediction whose variances are too large (`guard=100`), simulates
    micro-batches by parts of the batch (`groups`) and moves its running statistics by the first
    part (`running_group="first"`). There the layers without a prior store and hand on unbiased
    variances; `unbiased_running_var` does the former.

    A computed gain is that of a Kalman filter. The squared error of the predicted mean, in units of
    the predicted variance, and that of the predicted log-variance are averaged over the steps.
    Above what sampling n independent normal values explains (1 / n; for the log-variance the
    moments of a log chi-squared number) they are the variances tau^2 of the prediction, and the
    gains are tau^2 / (tau^2 + noise): one for the mean, one for the variance. The term q * (1 - q)
    * gap^2 with the gain of the mean then is the variance with which the mean remains unknown. No
    gradient flows through these gains.

    Attributes:
      gain: weight of the batch, in [0, 1]; "learned", the sigmoid of the parameter `gain_logit`; or
        "computed", which adds `mean_error` and `var_error` to the state.
      gain_per: "layer", or "channel" for a gain of each feature; for a learned or computed gain.
      initial_gain: where a learned gain starts, in (0, 1).
      effective_size: for a computed gain: how many independent values the statistics of a group are
        worth; None: as many as it has valid ones, too many where neighbours on a map are alike.
      groups: number of consecutive parts of the global batch with statistics of their own:
        micro-batches without their gradients. Under `axis_name` either whole groups lie on a
        device, or whole devices share a group.
      guard: ignore the prior, for this layer and step, if the mean of prior var / batch var over
        features and groups is not below this; None: never.
      posterior: "output", the moments of y with bias and scale: mean bias, variance scale^2, taken
        through the activation; or "fused", the statistics that normalized the input.
      running_group: "all": running statistics move by the average of the groups; "first".
      require_prior: whether training without a prior is an error.
      transition: None: the prior is for this layer's input. "learned": it is the posterior of the
        layer before, with `prior_features` features, which a learned matrix A and a learned
        diagonal noise R take here: mean A m, variance A^2 v + R (the state space of the paper, of
        which its implementation has neither).
      prior_features: number of features of the prior, for and only for a learned transition.
      transition_init: initializer of A, called with (key, (prior_features, features), param_dtype).
      axis, momentum, epsilon, use_scale, use_bias: as in `BatchNorm`.
      scale_init, bias_init, dtype, param_dtype: as in `BatchNorm`.
      axis_name, activation: as in `BatchNorm`.
      axis_index_groups: must be None: `groups` makes them.
      running_average, unbiased_running_var, skip_nonfinite: as in `BatchNorm`.
      constant_statistics: hold the fused mean and variance constant in the backward pass.

    Raises:
      ValueError: for a field outside its range or fields that contradict each other; in `apply`,
        for a prior that is missing or does not fit, groups that do not divide the batch or fit the
        devices, and as in `BatchNorm`.
      TypeError: in `apply`, for a prior that is no `Moments`, and as in `BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> first, second = nj.KalmanNorm(activation=jax.nn.relu), nj.KalmanNorm(gain=0.3)
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> x, kernel = jax.random.normal(keys[0], (2, 8)), jax.random.normal(keys[1], (8, 3))
      >>> (y, posterior), _ = first.apply(*first.init(keys[2], 8), x, train=True)
      >>> prior = nj.propagate.dense(posterior, kernel)
      >>> (z, _), _ = second.apply(*second.init(keys[3], 3), y @ kernel, train=True, prior=prior)
      >>> z.shape
      (2, 3)
    """

    returns_posterior: ClassVar[bool] = True

    gain: float | str = 0.5
    gain_per: Literal["layer", "channel"] = "layer"
    initial_gain: float = 0.5
    effective_size: float | None = None
    groups: int = 1
    guard: float | None = None
    posterior: Literal["output", "fused"] = "output"
    running_group: Literal["all", "first"] = "all"
    require_prior: bool = False
    transition: str | None = None
    prior_features: int | None = None
    transition_init: Callable[..., Any] = _LECUN

    def __post_init__(self):
        super().__post_init__()
        checks.no_index_groups(self, "`groups` makes the groups")
        if (self.transition is None) != (self.prior_features is None):
            raise ValueError(
                f"KalmanNorm: transition={self.transition!r} and prior_features="
                f"{self.prior_features}: a learned transition needs the latter, and nothing else."
            )
        if self.effective_size is not None and self.gain != "computed":
            raise ValueError(
                f"KalmanNorm: effective_size={self.effective_size}, but gain={self.gain!r}: it is "
                "for gain='computed'."
            )

    def init(self, key: Key, features: Features) -> tuple[KalmanParams, KalmanRunning]:
        """Parameters (`param_dtype`), running mean 0, variance 1, errors 1 (float32)."""
        shape = checks.features(type(self).__name__, features)
        scale, bias = affine_params(self, key, shape)
        logit = matrix = noise = None
        per_gain = shape if self.gain_per == "channel" else ()
        if self.gain == "learned":
            start = jax.scipy.special.logit(jnp.asarray(self.initial_gain, self.param_dtype))
            logit = jnp.broadcast_to(start, per_gain)
        if self.transition is not None:
            if len(shape) > 1:
                raise ValueError(
                    f"KalmanNorm: a learned transition is for one feature axis, not for {shape}."
                )
            key = None if key is None else jax.random.fold_in(key, 2)
            matrix = self.transition_init(key, (self.prior_features, *shape), self.param_dtype)
            noise = jnp.zeros(shape, self.param_dtype)
        state = running.init(shape, counted=self._counted())
        errors = (jnp.ones(shape, jnp.float32),) * 2 if self.gain == "computed" else (None, None)
        return KalmanParams(scale, bias, logit, matrix, noise), KalmanRunning(*state, *errors)

    @traced_once
    def apply(
        self,
        params: KalmanParams,
        state: KalmanRunning,
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
        prior: Moments | None = None,
    ) -> tuple[tuple[jax.Array, Moments], KalmanRunning]:
        """Normalizes `x` with fused statistics (`train=True`) or the running ones.

        Args:
          params, state, x, train, mask, key: as in `BatchNorm.apply`.
          prior: predicted moments of `x`, [features] or, with several groups on a device, [groups
            there, features]; with a learned transition those of the layer before. Not used in
            evaluation.

        Returns:
          The pair of the output and its moments (shaped as the prior: [features], and [groups
          there, features] if they are fused statistics of several groups), and the state.
        """
        name = type(self).__name__
        x, mask = passes.inputs(name, x, mask)
        at = self._features(x)
        small = AffineParams(params.scale, params.bias)
        checks.match(name, "axis", at, x.shape, (*small, state.mean, state.var))
        checks.counted(name, state, self._counted())
        others = tuple(i for i in range(x.ndim) if i not in at)
        if train:
            checks.need_positions(name, others, x.shape, self.axis_name)
            if prior is None and self.require_prior:
                raise ValueError(
                    f"{name}: prior=None, but require_prior=True: give the moments that "
                    "normjax.propagate predicts for this input."
                )
            return self._normalize_fused(params, state, x, mask, prior)
        lifted = AffineParams(*(None if a is None else jnp.expand_dims(a, others) for a in small))
        mean, var = (jnp.expand_dims(a, others) for a in (state.mean, state.var))
        y = passes.normalize(self, x, mean, var, lifted)
        return (y, self._moments_out(params, state.mean, state.var, x)), state

    def _normalize_fused(self, params, state, x, mask, prior):
        """Output with its moments, and state, of training."""
        at = self._features(x)
        others = tuple(i for i in range(x.ndim) if i not in at)
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        here = self._groups_here(x, at, devices)
        parts, valid = x, mask
        if here > 1:
            both = x, groups.samples_of_mask(mask, passes.value(x))
            parts, valid = jax.tree.map(lambda a: groups.split(a, 0, here), both)

        if prior is None:
            lone = None if self.groups > 1 and self.groups >= devices else self.axis_name
            sizes = [parts.shape[i + (here > 1)] for i in others]
            instead = "give a prior, or more samples or positions, or evaluate"
            checks.several_values(type(self).__name__, sizes, x.shape, lone, instead)

        def lift(a, grouped):
            """[features] or [groups, features] shaped as statistics, or as those of groups."""
            lead = (0,) if grouped and a.ndim == len(at) else ()
            return jnp.expand_dims(a, lead + tuple(i + grouped for i in others))

        now = passes.moments(parts, tuple(i + (here > 1) for i in others), mask=valid)
        now = now._replace(count=place(now.count, spec(now.mean), like=now.mean))
        if devices > 1 and self.groups == 1:
            now, _ = sync.over_devices(now, self.axis_name)
        predicted = ()
        if prior is not None:
            predicted = (lift(a, here > 1) for a in self._prior(prior, params, at, x, here))
            predicted = (jnp.broadcast_to(a, now.mean.shape) for a in predicted)
            predicted = (place(a, spec(now.mean), like=now.mean) for a in predicted)
        known = _Statistics(*now, *predicted)
        guarded = self.guard is not None and prior is not None
        together = devices > 1 and self.groups > 1 and (guarded or devices > self.groups)
        if together:
            known = self._all_groups(known, here)
        grouped = together or here > 1
        fused, errors = self._fuse(known, params, state, functools.partial(lift, grouped=grouped))
        mine = self._own_groups(fused, here, devices) if together else fused
        small = params.scale, params.bias
        lifted = AffineParams(*(None if a is None else lift(a, here > 1) for a in small))
        seen = self._statistics(mine)
        y = passes.normalize(self, parts, seen.mean, seen.var, lifted)
        y = groups.join(y, 0, like=passes.value(x)) if here > 1 else y

        def flat(tree, grouped):
            axes = tuple(i + grouped for i in others)
            return jax.tree.map(lambda a: jnp.squeeze(a, axes), tree)

        mine = flat(mine, here > 1)
        posterior = self._moments_out(params, mine.mean, mine.var, x)
        fused, errors = flat(fused, grouped), flat(errors, grouped)
        state = self._update(state, fused, errors, grouped, 1 if together else devices, x)
        return (y, posterior), state

    def _all_groups(self, known, here):
        """Statistics of all groups of the batch [groups, ...], by one message with the priors."""
        every: _Statistics = sync.gather(known, self.axis_name)
        if here > 1:
            return jax.tree.map(lambda a: a.reshape(self.groups, *a.shape[2:]), every)
        every = jax.tree.map(lambda a: a.reshape(self.groups, -1, *a.shape[1:]), every)
        now = sync.merge(every.moments(), 1)
        return jax.tree.map(lambda a: a[:, 0], every)._replace(**now._asdict())

    def _own_groups(self, every, here, devices):
        """Of statistics of all groups those of this device, or of the one that it shares."""
        first = lax.axis_index(self.axis_name) * self.groups // devices
        own = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, here), every)
        return own if here > 1 else jax.tree.map(lambda a: a[0], own)

    def _groups_here(self, x, at, devices):
        """How many groups lie on this device (one that is shared counts as one)."""
        name = type(self).__name__
        if self.groups == 1:
            return 1
        checks.samples_first(name, at, x.shape)
        if self.groups % devices and devices % self.groups:
            raise ValueError(
                f"{name}: groups={self.groups} and {devices} devices along axis "
                f"{self.axis_name!r}: one must divide the other."
            )
        here = max(self.groups // devices, 1)
        if x.shape[0] % here:
            raise ValueError(f"{name}: {here} groups do not divide a batch of shape {x.shape}.")
        return here

    def _prior(self, prior, params, at, x, here):
        """Predicted mean and variance, [features] or [groups, features]."""
        name = type(self).__name__
        if not isinstance(prior, Moments):
            raise TypeError(
                f"{name}: the prior is {type(prior).__name__}, not Moments: make one by "
                "normjax.propagate."
            )
        features, given = tuple(x.shape[i] for i in at), prior
        if self.transition is not None:
            given = propagate.dense(prior, params.transition_matrix)
            noise = jnp.exp(params.transition_log_noise.astype(given.var.dtype))
            given = given._replace(
                var=given.var + jnp.expand_dims(noise, range(given.var.ndim - 1))
            )
        mean, var = (jnp.asarray(a).astype(passes.wide(x.dtype)) for a in given[1:])
        lead = mean.shape[: mean.ndim - len(features)]
        fits = mean.shape == var.shape == (*lead, *features)
        if not fits or lead not in (((), (here,)) if here > 1 else ((),)):
            wanted = f"{features}" + (f" or {(here, *features)}" if here > 1 else "")
            raise ValueError(
                f"{name}: a prior with a mean of shape {mean.shape} and a variance of shape "
                f"{var.shape}, but the input of shape {x.shape} needs {wanted}."
            )
        return mean, var

    def _fuse(self, known, params, state, lift):
        """Fused statistics, and the squared errors of the prediction of mean and log-variance."""
        now, mean, var = known.moments(), known.prior_mean, known.prior_var
        if mean is None:
            return now, None
        tracked = now.count
        if self.guard is not None:
            used = lax.stop_gradient(jnp.mean(var / now.var)) < self.guard
            mean, var = lax.select(used, mean, now.mean), lax.select(used, var, now.var)
            tracked = tracked * used.astype(tracked.dtype)
        gap = mean - now.mean
        sampled = (now.count > 0).astype(now.mean.dtype)  # without a sample, only the prediction
        q, p = (gain * sampled for gain in self._gains(now, params, state, lift))
        fused = Moments(
            now.count,
            now.mean + (1 - q) * gap,
            now.var + (1 - p) * (var - now.var) + q * (1 - q) * jnp.square(gap),
        )
        if self.gain != "computed":
            return fused, None
        steady = var + self.epsilon
        errors = jnp.square(gap) / steady, jnp.square(jnp.log((now.var + self.epsilon) / steady))
        return fused, Moments(tracked, *errors)

    def _gains(self, now, params, state, lift):
        """Weights of the batch's mean and of its variance."""
        dtype = now.mean.dtype
        if self.gain == "learned":
            gain = jax.nn.sigmoid(params.gain_logit.astype(dtype))
            return (lift(gain) if gain.ndim else gain,) * 2
        if self.gain != "computed":
            return (jnp.asarray(self.gain, dtype),) * 2
        size = now.count if self.effective_size is None else jnp.asarray(self.effective_size, dtype)
        size = jnp.maximum(size, 1)
        half = jnp.maximum(size - 1, 1) / 2
        spread = jax.scipy.special.polygamma(1, half)
        offset = jax.scipy.special.digamma(half) - jnp.log(size / 2)

        def weigh(error, noise):
            error = lift(error) if self.gain_per == "channel" else jnp.mean(error)
            excess = jnp.maximum(error.astype(dtype) - noise, 0)
            return lax.stop_gradient(excess / (excess + noise))

        log_noise = spread + jnp.square(offset)
        return weigh(state.mean_error, 1 / size), weigh(state.var_error, log_noise)

    def _moments_out(self, params, mean, var, x):
        dtype = passes.wide(x.dtype)
        if self.posterior == "fused":
            return propagate.prediction(mean.astype(dtype), var.astype(dtype))
        plain = jnp.zeros(mean.shape[-len(self._features(x)) :], dtype)
        scale = plain + 1 if params.scale is None else params.scale.astype(dtype)
        bias = plain if params.bias is None else params.bias.astype(dtype)
        output = propagate.prediction(bias, jnp.square(scale))
        return propagate.activation(output, self.activation)

    def _update(self, state, fused, errors, grouped, devices, x):
        """The state after all groups: those of this device, of as many `devices`, if not of all."""
        options: dict[str, Any] = {"skip_nonfinite": self.skip_nonfinite}

        def move(fused, errors):
            new = running.update(
                Running(*state[:3]),
                fused,
                self.momentum,
                average=self.running_average,
                unbiased=self.unbiased_running_var,
                **options,
            )
            kept = state[3:]
            if errors is not None:
                kept = running.update(Running(*kept), errors, self.momentum, **options)[:2]
            return KalmanRunning(*new, *kept)

        if self.groups == 1:
            return move(fused, errors)
        stacked = (fused, errors) if grouped else jax.tree.map(lambda a: a[None], (fused, errors))
        each = jax.vmap(move)(*stacked)
        counts = jnp.any(stacked[0].count > 0, axis=tuple(range(1, state.mean.ndim + 1)))
        axis_name = None
        if devices > 1:
            axis_name = self.axis_name
            counts, _ = align(counts, passes.value(x))
        if self.running_group == "first":
            number = jnp.arange(len(counts))
            if devices > 1:
                number = number + lax.axis_index(self.axis_name) * self.groups // devices
            counts = counts & (number == 0)
        return running.average_filled(state, each, counts, axis_name)
