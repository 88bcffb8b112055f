"""The noise of ghost batches, on its own: drawn from the batch, or from its distribution.

Arrays of samples by channels have the shape [samples, 1, ..., features].
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import betaln, gammaln

from normjax.core import checks, passes, running, seam, statistics
from normjax.core.checks import field
from normjax.core.cpu import fence
from normjax.core.fields import COUNT, DTYPE, AxisFields, Schedule
from normjax.core.method import Normalizer, Traits
from normjax.core.sharding import place, place_like, spec
from normjax.core.statistics import Moments, Parted
from normjax.core.structs import AffineParams, AxisName, Features, Key, Mask, Running
from normjax.core.tracing import traced_once
from normjax.methods import batch
from normjax.methods.batch import GhostFields


class NoiseState(NamedTuple):
    """The number of updates, where the strength of the noise follows a schedule.

    Kosson, Fan & Jaggi, *Ghost Noise*, 2024, https://arxiv.org/abs/2305.17205

    Example:
      >>> import normjax as nj
      >>> nj.GhostNoise(16, strength=nj.Ramp(0.0, 1.0, 0, 100)).init(None, 3)[1].count.item()
      0.0
    """

    count: jax.Array | None = None  # f32[]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseFields(AxisFields):
    """How strong the noise is, and of what."""

    traits: ClassVar[Traits] = Traits(random=True)

    dtype: Any = field(None, DTYPE)
    axis_name: AxisName = field(None, checks.optional(checks.axis_name))
    noise: Literal["both", "shift", "scale"] = field(
        "both", checks.one_of("both", "shift", "scale")
    )
    strength: Schedule = field(1.0, checks.interval(0), schedule=True)
    unbiased_scale: bool = field(False, checks.flag)

    def __post_init__(self):
        super().__post_init__()
        strength = 0 if callable(self.strength) else self.strength
        size = getattr(self, "ghost_batch_size", None) or getattr(self, "effective_size", None) or 0
        if self.unbiased_scale and (self.noise == "shift" or size <= 1 + strength):
            raise ValueError(
                f"{type(self).__name__}: unbiased_scale=True with noise={self.noise!r}, strength="
                f"{self.strength} and size {size}: the expectation of 1 / scale ** strength needs "
                "noise of the scale and more than 1 + strength samples."
            )


@dataclasses.dataclass(frozen=True)
class DrawingFields(NoiseFields):
    """How ghosts are drawn: see `GhostNoise`, whose paper has the forms."""

    ghost_batch_size: int | None = field(None, COUNT)
    _: dataclasses.KW_ONLY
    drawing: Literal["replacement", "partition", "shuffle", "consecutive"] = field(
        "replacement", checks.one_of("replacement", "partition", "shuffle", "consecutive")
    )
    independent_channels: bool = field(False, checks.flag)
    effective_size: float | None = field(None, checks.optional(checks.interval(1)))

    def __post_init__(self):
        super().__post_init__()
        name, size = type(self).__name__, self.ghost_batch_size
        if (size is None) == (self.effective_size is None):
            raise ValueError(
                f"{name}: ghost_batch_size={size} and effective_size={self.effective_size}: give "
                "exactly one."
            )
        if self.drawing != "replacement" and (size is None or self.independent_channels):
            raise ValueError(
                f"{name}: drawing={self.drawing!r} with effective_size or independent_channels, "
                "which need drawing='replacement'."
            )

    def check_training(self, x: Any) -> None:
        """ValueError if ghosts are single values, whose variance is zero."""
        super().check_training(x)
        alone = 1 in (self.ghost_batch_size, self.effective_size) and self.noise != "shift"
        if alone and not checks.position_axes(self, jnp.shape(x)):
            raise ValueError(
                f"{type(self).__name__}: ghosts of size 1 of an input of shape {jnp.shape(x)} are "
                "single values, whose variance is zero; take more samples, or noise='shift'."
            )


def init(self: Any, key: Key, features: Features) -> tuple[tuple[()], NoiseState]:
    """No parameters; the number of updates if `strength` is a schedule."""
    checks.as_features(type(self).__name__, features)
    return (), NoiseState(jnp.zeros((), jnp.float32) if callable(self.strength) else None)


@traced_once
def apply(
    self: Any, params: Any, state: Any, x: Any, *, train: bool, mask: Mask = None, key: Key = None
) -> tuple[jax.Array, Any]:
    """Adds noise to `x`, with the samples on axis 0, if `train`; returns output and state.

    Every layer and step needs a `key` of its own.
    """
    x, mask = passes.inputs(self, x, mask)
    positions = checks.position_axes(self, x.shape)
    checks.require_leaf(self, state, "count", checks.has_schedule(self))
    if not train:
        return passes.value(x).astype(passes.output_dtype(self.dtype, x)), state
    key = checks.require_key(type(self).__name__, key)
    shift, scale, used = self.noise_of(x, positions, mask, key, state.count)
    count = None if state.count is None else state.count + used.astype(jnp.float32)
    return passes.affine(x, shift, 1 / scale, dtype=self.dtype), NoiseState(count)


@dataclasses.dataclass(frozen=True)
class GhostNoise(DrawingFields):
    """Ghost noise: shift and scale by which statistics of a few samples differ from the batch's.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205 (ghost noise injection, GNI).

    In training every sample gets a ghost of `ghost_batch_size` samples of the global batch, and
    becomes `(x - shift) / scale` with

        shift = ghost mean - batch mean
        scale = sqrt((ghost var + epsilon) / (batch var + epsilon))

    per channel, over samples and positions. Both are constants in the backward pass: the gradient
    is the cotangent over the scale. Evaluation is the identity. It belongs between a normalization
    and its affine map, as in the example, which `GhostNoiseBatchNorm` does in one pass, or behind
    any other norm. The default is the authors' replacement form (epfml/ghost-noise) with its
    epsilon; variances there are mean squares less squared means, here about the batch's mean.

    For dense Gaussian features the shift is Normal(0, 1/N) and the squared scale chi-squared with
    N - 1 degrees of freedom over N. Where positions are averaged the noise is weaker: a ghost of N
    samples acts like one of `N * batch var / var over samples of their means`.

    Under jit and under `axis_name`, with one key on all devices, ghosts are those of the global
    batch. Under a mapped axis without `axis_name` every device draws from its own samples: fold
    `lax.axis_index` into the key, or all have the same ghosts. Masked positions do not count, and
    samples without valid ones are not drawn.

    Attributes:
      ghost_batch_size: samples per ghost, N, > 0.
      axis: the feature axis, or several; the samples lie on axis 0.
      epsilon: added to both variances, >= 0. With 0, constant channels give NaN.
      dtype: dtype of the output; None: that of the input.
      axis_name: mapped axis name(s) whose devices hold the global batch.
      drawing: "replacement": N independent draws for every sample. "partition": the batch is
        divided at random into ghosts of N, and every sample is in its own. "shuffle": the same, but
        the first ghost belongs to the first N samples and so on, as in the authors' shuffle form.
        "consecutive": as in ghost batch norm. In the last three N must divide the batch.
      noise: "both", "shift" or "scale".
      independent_channels: draw anew for every channel, instead of keeping the correlation of
        channels; N random numbers per sample and channel. Only with replacement.
      effective_size: in place of `ghost_batch_size`: of each channel so many samples are averaged
        (one at least, the last with a fraction of its weight) that the shift has the variance
        `batch var / effective_size`, that of dense ghosts. Only with replacement.
      strength: factor on the shift and exponent of the scale, >= 0, or a schedule (a function of
        the number of updates, such as those of optax), which adds the leaf `count` to the state.
      unbiased_scale: divide by the expectation of 1 / scale as well, so that activations keep their
        size on average: that of a chi distribution of the effective size, exact for dense Gaussian
        features. Needs N > 1 + strength.

    Raises:
      ValueError: for fields outside their range or that contradict each other; in training, without
        a key, for a batch that N does not divide, and for ghosts without variance.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> plain, x = nj.BatchNorm(use_scale=False, use_bias=False), jax.numpy.ones((8, 5, 5, 3))
      >>> method = nj.chain(plain, nj.GhostNoise(4), nj.Affine())
      >>> y, state = method.apply(*method.init(None, 3), x, train=True, key=jax.random.key(2))
    """

    _: dataclasses.KW_ONLY
    epsilon: float = field(1e-3, checks.interval(0))

    init, apply = init, apply

    def noise_of(self, x: Any, positions: Any, mask: Any, key: Any, count: Any) -> Any:
        """Shift, scale, and whether any sample is valid."""
        samples = observe_samples(self, lax.stop_gradient(x), positions, mask)
        total = jax.tree.map(lambda a: a[None], statistics.merge(samples.every))
        noise = ghost_noise(self, self.epsilon, samples, total, key, count)
        return *noise, jnp.any(samples.every.count > 0)


class Samples(NamedTuple):
    """Moments of every sample of the global batch, and which of them are on this device."""

    every: Moments
    own: jax.Array  # means of the samples of this device
    first: jax.Array | None  # where these begin; None: they are all
    valid: jax.Array | None  # bool[samples], which have values; None: all

    def here(self, a: jax.Array) -> jax.Array:
        """The rows of `a` [samples, ...] for the samples of this device."""
        own = self.own.shape[0]
        return a if self.first is None else lax.dynamic_slice_in_dim(a, self.first, own)


def observe_samples(method: Any, x: Any, positions: Any, mask: Mask) -> Samples:
    """Moments of the samples of all devices, by one collective."""
    own, first = passes.moments(x, positions, mask=mask), None
    if method.axis_name is None:
        # Fenced, or XLA would make passes over the activation for sums of these sums.
        count, *rest = (place(a, (None,) * a.ndim, like=own.mean) for a in own)
        every = Moments(count, *fence(*rest))
    else:
        stacked = statistics.gather(own, method.axis_name)
        first = lax.axis_index(method.axis_name) * own.mean.shape[0]
        every = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
    valid = None if mask is None else jnp.any(every.count > 0, axis=tuple(range(1, x.ndim)))
    return Samples(every, own.mean, first, valid)


def ghost_noise(
    method: Any, epsilon: float, samples: Samples, batch: Moments, key: Any, count: Any
) -> tuple[jax.Array, jax.Array]:
    """Shift and scale of the samples of this device, by ghosts drawn with the fields of `method`.

    `batch` has the moments of all samples together, with a leading axis of size one.
    """
    every, batch = lax.stop_gradient((samples.every, batch))
    gap, like = every.mean - batch.mean, samples.own
    between = (every.count * jnp.square(gap)).sum(0, keepdims=True) / jnp.maximum(batch.count, 1)
    single = jnp.where(batch.var > 0, jnp.minimum(between / _nonzero(batch.var), 1), 1)
    roster = _roster(samples.valid, every.mean.shape[0])
    share, size = None, float(method.ghost_batch_size or 0)
    drawn = size
    if method.effective_size is not None:
        size = jnp.maximum(method.effective_size * single, 1)
        share, drawn = _shares(size)
    table = [gap, every.var + gap**2]
    if samples.valid is not None:
        number = jnp.where(gap == gap, every.count, every.count)  # sharded and batched alike
        table = [number, *(number * a for a in table)]
    totals = _totals(method, jnp.stack(table, 1), roster, key, samples.here, share)
    held = jnp.asarray(drawn, gap.dtype) if samples.valid is None else totals[:, 0]
    shift, scale = shift_and_scale(held, totals[:, -2], totals[:, -1], batch.var, epsilon)
    inverse_size = single / size
    if method.drawing != "replacement":
        n = jnp.maximum(roster.number, 2).astype(gap.dtype)
        inverse_size = inverse_size * jnp.maximum(n - size, 0) / (n - 1)
    shift, scale = _with_strength(method, shift, scale, count, inverse_size)
    return place(shift, spec(like), like=like), place(scale, spec(like), like=like)


def _nonzero(a):
    return jnp.where(a > 0, a, 1)


class _Roster(NamedTuple):
    samples: jax.Array | None  # i32[B], those that can, then the others; None: all can
    rank: jax.Array  # i32[B], of every sample among those that can
    valid: jax.Array  # bool[B]
    number: jax.Array  # u32[], how many can


def _roster(valid, samples):
    """Which samples can be drawn."""
    if valid is None:
        every = jnp.arange(samples, dtype=jnp.int32)
        return _Roster(None, every, jnp.ones(samples, bool), jnp.uint32(samples))
    rank = jnp.maximum(jnp.cumsum(valid.astype(jnp.int32)) - 1, 0)
    number = jnp.sum(valid.astype(jnp.uint32), dtype=jnp.uint32)
    return _Roster(jnp.argsort(~valid, stable=True).astype(jnp.int32), rank, valid, number)


def _words(key, rank, *shape):
    """Random words for every sample, which depend on the key and its rank alone."""
    return jax.vmap(lambda r: jax.random.bits(jax.random.fold_in(key, r), shape, jnp.uint32))(rank)


def draw_indices(key: jax.Array, rank: jax.Array, roster: _Roster, *shape: int) -> jax.Array:
    """Samples drawn with replacement, i32[rank, *shape], by remainders of random words."""
    drawn = (_words(key, rank, *shape) % jnp.maximum(roster.number, 1)).astype(jnp.int32)
    return drawn if roster.samples is None else roster.samples[drawn]


def draw_order(key: jax.Array, roster: _Roster) -> jax.Array:
    """All samples in random order, those that cannot be drawn last: i32[B]."""
    return jnp.lexsort((_words(key, roster.rank), ~roster.valid)).astype(jnp.int32)


def _totals(method, table, roster, key, here, share):
    """Sums of `table` [B, K, ...] over the ghost of each sample of this device."""
    samples, size = table.shape[0], method.ghost_batch_size
    if method.drawing == "replacement":
        size = math.ceil(method.effective_size) if size is None else size
        rank = here(roster.rank)
        if method.independent_channels:
            sizes = table.shape[2:]
            draw = lambda k: draw_indices(jax.random.fold_in(key, k), rank, roster, *sizes)
            return ghost_sums(table, draw, size, share, unroll=1)
        indices = draw_indices(key, rank, roster, size)
        return ghost_sums(table, lambda k: indices[:, k], size, share)
    if samples % size:
        raise ValueError(
            f"{type(method).__name__}: ghost_batch_size={size} does not divide a batch of "
            f"{samples}, which drawing={method.drawing!r} needs."
        )
    place_of = order = jnp.arange(samples, dtype=jnp.int32)
    if method.drawing != "consecutive":
        order = draw_order(key, roster)
        place_of = jnp.argsort(order) if method.drawing == "partition" else roster.rank
    ghosts = table[order].reshape(-1, size, *table.shape[1:]).sum(1)
    return ghosts[here(place_of) // size]


def ghost_sums(
    table: jax.Array, draw: Callable[..., Any], size: int, share: Any = None, unroll: int = 8
) -> jax.Array:
    """Sums of `table` [B, K, ...] over samples `draw(k)`, [R] or [R, ...], for k < `size`.

    `share(k)`, if given, weighs draw k. A loop adds `unroll` draws at a time.
    """

    def pick(k):
        i = draw(k)
        picked = table[i] if i.ndim == 1 else jnp.take_along_axis(table, i[:, None], 0)
        return picked if share is None else picked * share(k)[:, None]

    add = lambda total, k: (total + pick(k), None)
    others = jnp.arange(1, size, dtype=jnp.int32)
    return lax.scan(add, pick(jnp.int32(0)), others, unroll=unroll)[0]


def _shares(size):
    """Weights of the draws of a ghost of `size` samples, with a fraction of the last; their sum.

    n weights one and then a have the effective number (n + a)^2 / (n + a^2): the size n + f for
    this a.
    """
    n = jnp.floor(size)
    f = size - n
    last = n * f / (n + jnp.sqrt(jnp.maximum(n**2 - (size - 1) * n * f, 0)))

    def share(k):
        k = k.astype(size.dtype)
        return jnp.where(k < n, 1, jnp.where(k == n, last, 0))

    return share, n + last


def shift_and_scale(count: Any, first: Any, second: Any, var: Any, epsilon: float) -> Any:
    """Shift and scale [R, ...] of ghosts, by sums: how much each holds, gaps, and their squares.

    The gaps are those to the mean of the batch, of which `var` [1, ...] is the variance.
    """
    number = _nonzero(count)
    shift = first / number
    own = jnp.maximum(second / number - jnp.square(shift), 0)
    scale = jnp.sqrt((own + epsilon) / (var + epsilon))
    return shift, jnp.where(count > 0, scale, 1)


def _with_strength(method, shift, scale, count, inverse_size):
    """Of shift and scale what the fields of `method` ask for, after `count` updates."""
    shift = jnp.zeros_like(shift) if method.noise == "scale" else shift
    scale = jnp.ones_like(scale) if method.noise == "shift" else scale
    strength = method.strength
    if callable(strength) or strength != 1:
        strength = jnp.asarray(strength(count) if callable(strength) else strength, shift.dtype)
        shift, scale = shift * strength, scale**strength
    if method.unbiased_scale:
        scale = scale * expected_inverse(inverse_size, strength)
    return shift, scale


def expected_inverse(inverse_size: jax.Array, strength: Any) -> jax.Array:
    """Expectation of `scale ** -strength`, where `scale**2` is chi-squared over N.

    With N - 1 degrees of freedom it is `(N/2)^(s/2) Gamma((N - 1 - s)/2) / Gamma((N - 1)/2)`.
    """
    s = jnp.asarray(strength, inverse_size.dtype)
    some = _nonzero(s)
    size = 1 / jnp.maximum(inverse_size, 1e-7)
    ratio = betaln(some / 2, (size - 1 - some) / 2) - gammaln(some / 2)
    return jnp.where(s > 0, jnp.exp(some / 2 * jnp.log(size / 2) + ratio), 1)


@dataclasses.dataclass(frozen=True)
class GhostNoiseBatchNorm(DrawingFields, GhostFields):
    """Batch normalization with ghost noise, in one pass.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205: what `chain(BatchNorm(use_scale=False, use_bias=False),
    GhostNoise(N), Affine())` computes, as one layer with the variables of `BatchNorm`. The moments
    of every sample give those of the batch, of ghosts and, in closed form, of the normalized batch,
    so the noise costs no pass of its own. Evaluation is that of `BatchNorm`.

    Attributes:
      noise_epsilon: the epsilon of `GhostNoise`.
      ghost_batch_size, drawing, noise, independent_channels, effective_size, strength,
        unbiased_scale: as in `GhostNoise`.
      axis_index_groups: must be None.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, activation, running_average, unbiased_running_var, skip_nonfinite,
        constant_statistics: as in `BatchNorm`, with the errors of both; the samples lie on axis 0.

    Example:
      >>> import jax, normjax as nj
      >>> method, x = nj.GhostNoiseBatchNorm(4), jax.numpy.ones((8, 5, 5, 3))
      >>> y, state = method.apply(*method.init(None, 3), x, train=True, key=jax.random.key(2))
    """

    _: dataclasses.KW_ONLY
    noise_epsilon: float = field(1e-3, checks.interval(0))

    init, evaluation, apply = batch.init, batch.evaluation, seam.apply
    absorb = running.absorb_whole

    def observe(self, x: Any, mask: Mask = None) -> Parted:
        """Moments of the batch [features]; `parts` has those of every sample."""
        x, mask = passes.inputs(self, x, mask)
        positions = checks.position_axes(self, x.shape)
        samples = observe_samples(self, x, positions, mask)
        total, over = statistics.merge(samples.every), tuple(i - 1 for i in positions)
        return Parted(*(jnp.squeeze(a, over) for a in total), parts=samples)

    def coefficients(
        self, params: AffineParams, state: Running, seen: Parted, *, key: Key = None
    ) -> Normalizer:
        """Normalizes by the batch, then by the noise of ghosts of the normalized batch."""
        samples, rank = seen.parts, seen.parts.own.ndim
        at = checks.as_axes(type(self).__name__, "axis", self.axis, samples.own.shape)
        total = Moments(*(passes.lift(a, at, rank) for a in seen[:3]))
        total = lax.stop_gradient(total) if self.constant_statistics else total
        inverse = passes.inverse_deviation(total.var, self.epsilon)

        def normalized(part):
            gap = (part.mean - total.mean) * inverse
            return Moments(part.count, gap, part.var * jnp.square(inverse))

        samples = samples._replace(every=normalized(samples.every))
        noise = self, self.noise_epsilon, samples, normalized(total)
        key = checks.require_key(type(self).__name__, key)
        shift, divisor = ghost_noise(*noise, key, state.count)
        lifted = lambda a: passes.lift(a.astype(shift.dtype), at, rank)
        scale, bias = jax.tree.map(lifted, params)
        slope = 1 / divisor if scale is None else scale / divisor
        bias = -shift * slope if bias is None else bias - shift * slope
        return Normalizer(total.mean, inverse * slope, None, bias)


@dataclasses.dataclass(frozen=True)
class AnalyticGhostNoise(NoiseFields):
    """Ghost noise from its distribution for dense Gaussian features, instead of from the batch.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205 (epfml/ghost-noise, noisy affine transform).

    In training `(x - shift) / scale` with `shift` from Normal(0, 1/N) and `scale**2` from the
    chi-squared distribution with N - 1 degrees of freedom over N, independent for every sample and
    channel: the noise of a sample depends on the key and on its place in the batch alone.
    Evaluation is the identity.

    Attributes:
      ghost_batch_size: N, > 1 for noise of the scale.
      axis, dtype, noise, strength, unbiased_scale: as in `GhostNoise`, with its errors.
      axis_name: mapped axis name(s) whose devices hold the global batch and have the same key.
        Without it, fold `lax.axis_index` into the key.
      shift_unit: "one"; "deviation": the shift is in units of the deviation of the sample's own
        channel over positions (ValueError if it has none), for input that is not normalized;
        "deviation, differentiated": with the gradient of these, as in the public implementation
        (there infinite for constant maps).

    Example:
      >>> import jax, normjax as nj
      >>> method, x = nj.chain(nj.LayerNorm(), nj.AnalyticGhostNoise(16)), jax.numpy.ones((8, 3))
      >>> y, state = method.apply(*method.init(None, 3), x, train=True, key=jax.random.key(2))
    """

    ghost_batch_size: int = dataclasses.field(metadata=checks.rule(checks.positive))
    _: dataclasses.KW_ONLY
    shift_unit: Literal["one", "deviation", "deviation, differentiated"] = field(
        "one", checks.one_of("one", "deviation", "deviation, differentiated")
    )

    init, apply = init, apply

    def __post_init__(self):
        super().__post_init__()
        if self.ghost_batch_size == 1 and self.noise != "shift":
            raise ValueError(
                f"AnalyticGhostNoise: ghost_batch_size=1 with noise={self.noise!r}: the scale of a "
                "ghost needs two samples or more."
            )

    def check_training(self, x: Any) -> None:
        """ValueError for deviations of single values."""
        if self.shift_unit != "one" and not checks.position_axes(self, jnp.shape(x)):
            raise ValueError(
                f"AnalyticGhostNoise: shift_unit={self.shift_unit!r}, but an input of shape "
                f"{jnp.shape(x)} has no positions to take a deviation over."
            )

    def noise_of(self, x: Any, positions: Any, mask: Any, key: Any, count: Any) -> Any:
        """Shift, scale, and whether any position is valid."""
        dtype = passes.wide(x.dtype)
        unit = jnp.ones((1,) * x.ndim, dtype)
        if self.shift_unit != "one":
            var = passes.moments(x, positions, mask=mask).var
            unit = jnp.where(var > 0, jnp.sqrt(_nonzero(var)), 0)
            unit = unit if self.shift_unit.endswith("differentiated") else lax.stop_gradient(unit)
        shape = tuple(1 if i in positions else n for i, n in enumerate(x.shape))
        drawn = draw_analytic(self, key, shape, dtype)
        normal, chi2 = (place_like(a, passes.value(x)) for a in drawn)
        shift = normal * unit / math.sqrt(self.ghost_batch_size)
        scale = jnp.sqrt(chi2 / self.ghost_batch_size)
        inverse_size = jnp.full((1,) * x.ndim, 1 / self.ghost_batch_size, dtype)
        used = jnp.asarray(0 not in x.shape) if mask is None else jnp.any(mask)
        if mask is not None and self.axis_name is not None and count is not None:
            used = lax.psum(used.astype(jnp.float32), self.axis_name) > 0
        return *_with_strength(self, shift, scale, count, inverse_size), used


def draw_analytic(
    method: AnalyticGhostNoise, key: jax.Array, shape: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Standard normal and chi-squared numbers for the samples of this device.

    A chi-squared number is a sum of exponential ones, one for each pair of degrees of freedom, and
    of the square of a normal one if a degree is left, of uniform numbers that are exact in float32.
    """
    first = 0 if method.axis_name is None else lax.axis_index(method.axis_name) * shape[0]
    rank = first + jnp.arange(shape[0], dtype=jnp.int32)
    words = lambda number: _words(jax.random.fold_in(key, number), rank, *shape[1:])

    def normal(number):  # of odd multiples of 2**-23 in (-1, 1)
        odd = (words(number) >> 9).astype(jnp.int32) * 2 + (1 - 2**23)
        return math.sqrt(2) * lax.erf_inv(odd.astype(dtype) * 2**-23)

    def add(total, number):  # an exponential number, of multiples of 2**-24 in (0, 1]
        drawn = -2 * jnp.log(((words(number) >> 8) + 1).astype(dtype) * 2**-24)
        return total + drawn, None

    pairs, left = divmod(method.ghost_batch_size - 1, 2)
    chi2 = jnp.square(normal(1)) if left else jnp.zeros_like(normal(0))
    return normal(0), lax.scan(add, chi2, jnp.arange(2, 2 + pairs))[0]
