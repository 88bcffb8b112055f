"""The noise of ghost batches, on its own: drawn from the batch, or from its distribution.

A ghost batch is a handful of samples. Statistics over it differ from those over the whole batch by
a shift and a scale per channel, and `GhostNoise` applies these to a sample that is normalized
already. Everything happens in arrays of samples by channels, `[B, 1, ..., C]`; then one affine pass
applies the noise.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import betaln, gammaln

from normjax.core import checks, passes, sync
from normjax.core.cpu import fence
from normjax.core.sharding import place, spec
from normjax.core.structs import Axes, AxisName, Features, Key, Moments
from normjax.core.tracing import traced_once

Strength = float | Callable[[Any], Any]
# Ghosts of N of B samples come from a product with counts for N**2 > MANY * B, else by gathering:
# benchmarks/results/drawing/drawing.json.
MANY = 8


class NoiseState(NamedTuple):
    """The number of updates, where the strength of the noise follows a schedule.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205

    Example:
      >>> import normjax as nj
      >>> nj.GhostNoise(16).init(None, 3)[1].count
      >>> nj.GhostNoise(16, strength=nj.Ramp(0.0, 1.0, 0, 100)).init(None, 3)[1].count.item()
      0.0
    """

    count: jax.Array | None = None  # f32[]


@dataclasses.dataclass(frozen=True)
class GhostNoise:
    """Ghost noise: shift and scale by which statistics of a few samples differ from the batch's.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205 (ghost noise injection, GNI).

    In training every sample gets a ghost batch of `ghost_batch_size` samples of the global batch,
    and becomes `(x - shift) / scale` with

        shift = ghost mean - batch mean
        scale = sqrt((ghost var + epsilon) / (batch var + epsilon))

    per channel, over samples and positions. Shift and scale are constants in the backward pass, so
    that the gradient is the cotangent over the scale. Evaluation is the identity. It belongs
    between a normalization and its affine map, `chain(BatchNorm(use_scale=False, use_bias=False),
    GhostNoise(16), Affine())`, which `GhostNoiseBatchNorm` does in one pass, or behind any other
    norm. The default is the authors' replacement form (epfml/ghost-noise) with its epsilon; there
    variances are mean squares less squared means, here they are about the mean of the batch.

    For dense Gaussian features the shift is Normal(0, 1/N) and the squared scale chi-squared with
    N - 1 degrees of freedom over N. Where positions are averaged the noise is weaker: a ghost of N
    samples acts like one of `N * batch var / var over samples of their means`.

    Under jit ghosts are drawn from the global batch; under `axis_name` too, from the small moments,
    and with the same key on all devices the result is that of one device. Without `axis_name`
    under a mapped axis every device draws from its own samples, without communication; then fold
    `lax.axis_index` into the key, or all devices have the same ghosts.

    With a mask, samples without valid positions are not drawn and moments are over valid positions.

    Attributes:
      ghost_batch_size: samples per ghost, N, > 0.
      axis: the feature axis, or several; the samples lie on axis 0.
      epsilon: added to both variances, >= 0. With 0, constant channels give NaN.
      dtype: dtype of the output; None: that of the input.
      axis_name: mapped axis name(s) whose devices hold the global batch.
      drawing: "replacement": N independent draws for every sample. "partition": the batch is
        divided at random into ghosts of N, and every sample is in its own. "shuffle": the same
        ghosts, but the first belongs to the first N samples and so on, as in the authors' shuffle
        form. "consecutive": ghosts are consecutive samples, as in ghost batch norm. The last three
        need N to divide the batch.
      noise: "both", "shift" or "scale".
      independent_channels: draw anew for every channel, instead of keeping the correlation that
        channels of real ghost batches have. Only with replacement; takes N random numbers per
        sample and channel.
      effective_size: in place of `ghost_batch_size`, the size of a dense ghost with the same
        variance of the shift: for each channel so many samples are averaged (the last with a
        fraction of its weight, one at least) that the shift has the variance `batch var /
        effective_size`. Only with replacement.
      strength: factor on the shift and exponent of the scale, >= 0, or a schedule (a function of
        the number of updates, such as those of optax), which adds the leaf `count` to the state.
      unbiased_scale: divide by the expectation of 1 / scale as well, so that the noise keeps the
        size of activations on average: in closed form for the chi distribution of the effective
        size, hence exact for dense Gaussian features. Needs N > 1 + strength.

    Raises:
      ValueError: for a field outside its range or fields that contradict each other; in `apply`,
        for training without a key, a batch that N does not divide, or ghosts without variance.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> plain = nj.BatchNorm(use_scale=False, use_bias=False)
      >>> method = nj.chain(plain, nj.GhostNoise(4), nj.Affine())
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (8, 5, 5, 3))
      >>> y, state = method.apply(params, state, x, train=True, key=jax.random.key(2))
      >>> y.shape
      (8, 5, 5, 3)
    """

    random: ClassVar[bool] = True

    ghost_batch_size: int | None = None
    _: dataclasses.KW_ONLY
    axis: Axes = -1
    epsilon: float = 1e-3
    dtype: Any = None
    axis_name: AxisName = None
    drawing: Literal["replacement", "partition", "shuffle", "consecutive"] = "replacement"
    noise: Literal["both", "shift", "scale"] = "both"
    independent_channels: bool = False
    effective_size: float | None = None
    strength: Strength = 1.0
    unbiased_scale: bool = False

    def __post_init__(self):
        checks.configuration(self)
        check_drawing(self)

    def init(self, key: Key, features: Features) -> tuple[tuple[()], NoiseState]:
        """No parameters; the number of updates if `strength` is a schedule."""
        del key
        checks.features("GhostNoise", features)
        return (), _first_state(self)

    @traced_once
    def apply(
        self,
        params: tuple[()],
        state: NoiseState,
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, NoiseState]:
        """Adds the noise (`train=True`) or nothing.

        Args:
          params: none.
          state: from `init`; with a schedule the number of updates, moved if `train`.
          x: real array, normalized, with the samples on axis 0 and the features on `axis`.
          train: whether to add noise.
          mask: broadcasts to `x`; see the class.
          key: draws the ghosts; one of its own for every layer and step.

        Returns:
          The output, of the shape of `x`, and the state.
        """
        del params
        name = "GhostNoise"
        x, mask = passes.inputs(name, x, mask)
        at = checks.axes(name, "axis", self.axis, x.shape)
        positions = checks.samples_first(name, at, x.shape)
        _check_state(name, self, state)
        if not train:
            return passes.value(x).astype(passes.output_dtype(self.dtype, x)), state
        check_ghosts(self, positions, x.shape)
        own = passes.moments(lax.stop_gradient(x), positions, mask=mask)
        every, first = gathered(own, self.axis_name)
        batch = Moments(*(a[None] for a in sync.merge(every)))
        shift, scale = ghost_noise(
            self, self.epsilon, every, batch, key, state.count, masked=mask is not None
        )(first, own.mean)
        state = _advanced(state, jnp.any(every.count > 0))
        return passes.affine(x, shift, 1 / scale, dtype=self.dtype), state


def check_drawing(method: Any) -> None:
    """ValueError for fields of a drawing that contradict each other."""
    name, size = type(method).__name__, method.ghost_batch_size
    if (size is None) == (method.effective_size is None):
        raise ValueError(
            f"{name}: ghost_batch_size={size} and effective_size={method.effective_size}: give "
            "exactly one."
        )
    for field in ("effective_size", "independent_channels"):
        value = getattr(method, field)
        if value not in (None, False) and method.drawing != "replacement":
            raise ValueError(
                f"{name}: {field}={value} with drawing={method.drawing!r}: ghosts of so many "
                "samples for each channel are drawn with drawing='replacement' only."
            )
    check_unbiased(method, method.effective_size if size is None else size)


def check_unbiased(method: Any, size: float) -> None:
    """ValueError if the expectation of 1 / scale is asked for and there is none."""
    if not method.unbiased_scale:
        return
    strength = 0 if callable(method.strength) else method.strength
    if method.noise == "shift" or size <= 1 + strength:
        why = f"strength={method.strength} and size {size}" if method.noise != "shift" else "shift"
        raise ValueError(
            f"{type(method).__name__}: unbiased_scale=True with noise={method.noise!r} ({why}): it "
            "divides by the expectation of 1 / scale ** strength, which needs noise of the scale "
            "and more than 1 + strength samples."
        )


def check_ghosts(method: Any, positions: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """ValueError if ghosts are single values, whose variance is zero."""
    size = method.ghost_batch_size or method.effective_size
    if size == 1 and not positions and method.noise != "shift":
        raise ValueError(
            f"{type(method).__name__}: ghosts of size 1 of an input of shape {shape} are single "
            "values, whose variance is zero; take more samples, or noise='shift'."
        )


def _first_state(method: Any) -> NoiseState:
    """No updates so far, or nothing to count."""
    return NoiseState(jnp.zeros((), jnp.float32) if callable(method.strength) else None)


def _check_state(name: str, method: Any, state: NoiseState) -> None:
    """ValueError unless `state` counts exactly if the strength is a schedule."""
    checks.counted(name, state, callable(method.strength))


def _advanced(state: NoiseState, used: jax.Array) -> NoiseState:
    """`state` after an update that counts if `used`."""
    return NoiseState(None if state.count is None else state.count + used.astype(jnp.float32))


def gathered(own: Moments, axis_name: AxisName) -> tuple[Moments, jax.Array | None]:
    """Moments of every sample of the global batch, and where this device's begin (None: all)."""
    if axis_name is None:
        whole = (None,) * own.mean.ndim
        # Fenced, or XLA would make passes over the activation for sums of these sums.
        count, *rest = (place(a, whole, like=own.mean) for a in own)
        return Moments(count, *fence(*rest)), None
    stacked = sync.gather(own, axis_name)
    first = lax.axis_index(axis_name) * own.mean.shape[0]
    return Moments(*(a.reshape(-1, *a.shape[2:]) for a in stacked)), first


def ghost_noise(
    method: Any,
    epsilon: float,
    every: Moments,
    batch: Moments,
    key: Key,
    count: jax.Array | None,
    *,
    masked: bool,
) -> Callable[[jax.Array | None, jax.Array], tuple[jax.Array, jax.Array]]:
    """Draws ghosts with the fields of `method` from the moments `every` of all samples.

    `batch` has the moments of these together, with a leading axis of size one.

    Returns:
      A function of the first sample of this device (None: all are its own) and of an array of its
      samples, which gives shift and scale of the shape and with the sharding of that array.
    """
    key = checks.need_key(type(method).__name__, key)
    every, batch = lax.stop_gradient((every, batch))
    gap = every.mean - batch.mean
    samples = every.mean.shape[0]
    between = (every.count * jnp.square(gap)).sum(0, keepdims=True) / jnp.maximum(batch.count, 1)
    single = jnp.where(batch.var > 0, jnp.minimum(between / _nonzero(batch.var), 1), 1)
    valid = jnp.any(every.count > 0, axis=tuple(range(1, gap.ndim))) if masked else None
    roster = _roster(valid, samples)
    share, size = None, float(method.ghost_batch_size or 0)
    drawn = size
    if method.effective_size is not None:
        size = jnp.maximum(method.effective_size * single, 1)
        share, drawn = _shares(size)
    table = [gap, every.var + gap**2]
    if masked:
        number = jnp.where(gap == gap, every.count, every.count)  # sharded and batched alike
        table = [number, *(number * a for a in table)]
    table = jnp.stack(table, 1)

    def noise(first, like):
        def mine(a):
            return a if first is None else lax.dynamic_slice_in_dim(a, first, like.shape[0])

        totals = _totals(method, table, roster, key, mine, share)
        held = totals[:, 0] if masked else jnp.asarray(drawn, gap.dtype)
        sums = totals[:, -2], totals[:, -1]
        shift, scale = shift_and_scale(held, *sums, batch.var, epsilon, method.noise)
        strength = _strength_at(method.strength, count, shift.dtype)
        shift, scale = _strengthened(shift, scale, strength)
        if method.unbiased_scale:
            inverse = single / size
            if method.drawing != "replacement":
                n = jnp.maximum(roster.number, 2).astype(shift.dtype)
                inverse = inverse * jnp.maximum(n - size, 0) / (n - 1)
            scale = scale * expected_inverse(inverse, strength)
        return place(shift, spec(like), like=like), place(scale, spec(like), like=like)

    return noise


def _nonzero(a):
    return jnp.where(a > 0, a, 1)


class _Roster(NamedTuple):
    """Which samples can be drawn."""

    samples: jax.Array | None  # i32[B], those that can, then the others; None: all can
    rank: jax.Array  # i32[B], of every sample among those that can
    valid: jax.Array  # bool[B]
    number: jax.Array  # u32[], how many can


def _roster(valid, samples):
    every = jnp.arange(samples, dtype=jnp.int32)
    if valid is None:
        return _Roster(None, every, jnp.ones(samples, bool), jnp.uint32(samples))
    rank = jnp.maximum(jnp.cumsum(valid.astype(jnp.int32)) - 1, 0)
    number = jnp.sum(valid.astype(jnp.uint32), dtype=jnp.uint32)
    return _Roster(jnp.argsort(~valid, stable=True).astype(jnp.int32), rank, valid, number)


def _words(key, rank, *shape):
    """Random words for every sample, which depend on the key and its rank alone."""
    return jax.vmap(lambda r: jax.random.bits(jax.random.fold_in(key, r), shape, jnp.uint32))(rank)


def draw_indices(key: jax.Array, rank: jax.Array, roster: _Roster, *shape: int) -> jax.Array:
    """Samples drawn with replacement: i32[rank, *shape].

    One random word each, whose remainder favours no sample by more than its share of 2**-32.
    """
    drawn = (_words(key, rank, *shape) % jnp.maximum(roster.number, 1)).astype(jnp.int32)
    return drawn if roster.samples is None else roster.samples[drawn]


def draw_order(key: jax.Array, roster: _Roster) -> jax.Array:
    """All samples in random order, those that cannot be drawn last: i32[B]."""
    return jnp.lexsort((_words(key, roster.rank), ~roster.valid)).astype(jnp.int32)


def _totals(method, table, roster, key, mine, share):
    """Sums of `table` [B, K, ...] over the ghost of each sample of this device."""
    samples, size = table.shape[0], method.ghost_batch_size
    if method.drawing == "replacement":
        size = math.ceil(method.effective_size) if size is None else size
        rank = mine(roster.rank)
        if method.independent_channels:
            sizes = table.shape[2:]
            draw = lambda k: draw_indices(jax.random.fold_in(key, k), rank, roster, *sizes)
            return gather_each(table, draw, size, share)
        return resampled(table, draw_indices(key, rank, roster, size), share)
    if samples % size:
        raise ValueError(
            f"{type(method).__name__}: ghost_batch_size={size} does not divide a batch of "
            f"{samples}, which drawing={method.drawing!r} needs."
        )
    place_of = jnp.arange(samples, dtype=jnp.int32)
    order = place_of if method.drawing == "consecutive" else draw_order(key, roster)
    if method.drawing == "partition":
        place_of = jnp.argsort(order)
    elif method.drawing == "shuffle":
        place_of = roster.rank
    return partitioned(table, order, mine(place_of), size)


def resampled(
    table: jax.Array,
    indices: jax.Array,
    share: Callable | None = None,
    *,
    count: bool | None = None,
) -> jax.Array:
    """Sums of `table` [B, ...] over samples `indices` [R, N]: [R, ...].

    By a product with the matrix of how often each sample was drawn (`count=True`), or by gathering
    one draw after the other; None chooses. `share(k)` weighs draw k. Neither way makes an array of
    all drawn moments.
    """
    rows, size = indices.shape
    if count is None:
        count = counts_draws(size, table.shape[0])
    if share is not None or not count:
        return gather_each(table, lambda k: indices[:, k], size, share)
    counts = jnp.zeros((rows, table.shape[0]), table.dtype)
    counts = counts.at[jnp.arange(rows, dtype=indices.dtype)[:, None], indices].add(1)
    return jnp.tensordot(counts, table, 1, precision=lax.Precision.HIGHEST)


def counts_draws(size: int, samples: int) -> bool:
    """Whether sums over ghosts of `size` of so many samples come from a product with counts."""
    # Of a batch of unknown size the draws are gathered.
    return isinstance(samples, int) and size**2 > MANY * samples


def gather_each(
    table: jax.Array, draw: Callable[[jax.Array], jax.Array], size: int, share: Callable | None
) -> jax.Array:
    """Sums of `table` [B, K, ...] over `draw(k)` for k < `size`: samples [R] or [R, ...]."""

    def pick(k):
        index = draw(k)
        alone = index.ndim == 1
        picked = table[index] if alone else jnp.take_along_axis(table, index[:, None], 0)
        return picked if share is None else picked * share(k)[:, None]

    def add(total, k):
        return total + pick(k), None

    total, _ = lax.scan(add, pick(jnp.int32(0)), jnp.arange(1, size, dtype=jnp.int32))
    return total


def partitioned(table: jax.Array, order: jax.Array, place_of: jax.Array, size: int) -> jax.Array:
    """Sums of `table` [B, ...] over ghosts of `size` samples, which follow one another in `order`.

    `place_of` [R] is the place in that order whose ghost a sample gets.
    """
    ghosts = table[order].reshape(-1, size, *table.shape[1:]).sum(1)
    return ghosts[place_of // size]


def _shares(size):
    """Weights of the draws of a ghost of `size` samples, with a fraction of the last; their sum.

    Weights one, n times, and then a have the effective number (n + a)^2 / (n + a^2), which is the
    size n + f for this a.
    """
    n = jnp.floor(size)
    f = size - n
    last = n * f / (n + jnp.sqrt(jnp.maximum(n**2 - (size - 1) * n * f, 0)))

    def share(k):
        k = k.astype(size.dtype)
        return jnp.where(k < n, 1, jnp.where(k == n, last, 0))

    return share, n + last


def shift_and_scale(
    count: jax.Array,
    first: jax.Array,
    second: jax.Array,
    var: jax.Array,
    epsilon: float,
    noise: str,
) -> tuple[jax.Array, jax.Array]:
    """The noise of ghosts.

    Args:
      count: how much each ghost holds, [R, ...] or one for all.
      first: the sum of its gaps to the mean of the batch, [R, ...].
      second: the sum of their squares.
      var: variance of the batch, [1, ...].
      epsilon: added to both variances.
      noise: "both", "shift" or "scale".
    """
    number = _nonzero(count)
    shift = first / number
    own = jnp.maximum(second / number - jnp.square(shift), 0)
    scale = jnp.sqrt((own + epsilon) / (var + epsilon))
    if noise == "shift":
        scale = jnp.ones_like(scale)
    shift = jnp.zeros_like(shift) if noise == "scale" else shift
    return shift, jnp.where(count > 0, scale, 1)


def _strength_at(strength: Strength, count: jax.Array | None, dtype: Any) -> Any:
    """The strength after `count` updates: the float 1.0 where it is one for good, else an array."""
    if not callable(strength) and strength == 1:
        return 1.0
    return jnp.asarray(strength(count) if callable(strength) else strength, dtype)


def _strengthened(shift: jax.Array, scale: jax.Array, strength: Any) -> tuple[jax.Array, jax.Array]:
    """`shift` times `strength`, and `scale` to its power."""
    return (shift, scale) if isinstance(strength, float) else (shift * strength, scale**strength)


def expected_inverse(inverse_size: jax.Array, strength: Any) -> jax.Array:
    """Expectation of `scale ** -strength`, where `scale**2` is chi-squared over N.

    With N - 1 degrees of freedom it is `(N/2)^(s/2) Gamma((N - 1 - s)/2) / Gamma((N - 1)/2)`.
    """
    s = jnp.asarray(strength, inverse_size.dtype)
    some = jnp.where(s > 0, s, 1)
    size = 1 / jnp.maximum(inverse_size, 1e-7)
    ratio = betaln(some / 2, (size - 1 - some) / 2) - gammaln(some / 2)
    return jnp.where(s > 0, jnp.exp(some / 2 * jnp.log(size / 2) + ratio), 1)


@dataclasses.dataclass(frozen=True)
class AnalyticGhostNoise:
    """Ghost noise from its distribution for dense Gaussian features, instead of from the batch.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205 (epfml/ghost-noise, noisy affine transform).

    In training `(x - shift) / scale` with `shift` from Normal(0, 1/N) and `scale**2` from the
    chi-squared distribution with N - 1 degrees of freedom over N, independent for every sample and
    channel. Evaluation is the identity. No sample sees another: there is no communication, and the
    noise of a sample depends on the key and on its place in the batch.

    Attributes:
      ghost_batch_size: N, > 1 for noise of the scale.
      axis: the feature axis, or several; the samples lie on axis 0.
      dtype: dtype of the output; None: that of the input.
      axis_name: mapped axis name(s) whose devices hold the global batch: with the same key on all
        of them, the result is that of one device. Without it, fold `lax.axis_index` into the key.
      noise: "both", "shift" or "scale".
      shift_unit: in what the shift is measured. "one". "deviation": the standard deviation of the
        sample's own channel over positions, for input that is not normalized; a constant of the
        backward pass. "deviation, differentiated": with its gradient, as in the public
        implementation (zero for constant maps, where that has infinity).
      strength: factor on the shift and exponent of the scale, >= 0, or a schedule (a function of
        the number of updates), which adds the leaf `count` to the state.
      unbiased_scale: divide by the expectation of 1 / scale as well. Needs N > 1 + strength.

    Raises:
      ValueError: for a field outside its range or fields that contradict each other; in `apply`,
        for training without a key or deviations of single values.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.chain(nj.LayerNorm(), nj.AnalyticGhostNoise(16))
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (8, 5, 3))
      >>> y, state = method.apply(params, state, x, train=True, key=jax.random.key(2))
      >>> y.shape
      (8, 5, 3)
    """

    random: ClassVar[bool] = True

    ghost_batch_size: int
    _: dataclasses.KW_ONLY
    axis: Axes = -1
    dtype: Any = None
    axis_name: AxisName = None
    noise: Literal["both", "shift", "scale"] = "both"
    shift_unit: Literal["one", "deviation", "deviation, differentiated"] = "one"
    strength: Strength = 1.0
    unbiased_scale: bool = False

    def __post_init__(self):
        checks.configuration(self)
        if self.ghost_batch_size is None or (self.ghost_batch_size == 1 and self.noise != "shift"):
            raise ValueError(
                f"AnalyticGhostNoise: ghost_batch_size={self.ghost_batch_size} with noise="
                f"{self.noise!r}: the scale of a ghost needs two samples or more."
            )
        check_unbiased(self, self.ghost_batch_size)

    def init(self, key: Key, features: Features) -> tuple[tuple[()], NoiseState]:
        """No parameters; the number of updates if `strength` is a schedule."""
        del key
        checks.features("AnalyticGhostNoise", features)
        return (), _first_state(self)

    @traced_once
    def apply(
        self,
        params: tuple[()],
        state: NoiseState,
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, NoiseState]:
        """Adds the noise (`train=True`) or nothing; see `GhostNoise.apply`."""
        del params
        name = "AnalyticGhostNoise"
        x, mask = passes.inputs(name, x, mask)
        at = checks.axes(name, "axis", self.axis, x.shape)
        positions = checks.samples_first(name, at, x.shape)
        _check_state(name, self, state)
        if not train:
            return passes.value(x).astype(passes.output_dtype(self.dtype, x)), state
        if self.shift_unit != "one" and not positions:
            raise ValueError(
                f"{name}: shift_unit={self.shift_unit!r}, but an input of shape {x.shape} has no "
                "positions to take a deviation over."
            )
        dtype = passes.wide(x.dtype)
        unit = jnp.ones((), dtype).reshape((1,) * x.ndim)
        if self.shift_unit != "one":
            var = passes.moments(x, positions, mask=mask).var
            unit = jnp.where(var > 0, jnp.sqrt(_nonzero(var)), 0)
            unit = unit if self.shift_unit.endswith("differentiated") else lax.stop_gradient(unit)
        shape = tuple(n if i in (0, *at) else 1 for i, n in enumerate(x.shape))
        normal, chi2 = draw_analytic(self, checks.need_key(name, key), shape, dtype)
        parts = spec(passes.value(x))
        normal, chi2 = (
            place(
                a,
                tuple(n if i in (0, *at) else None for i, n in enumerate(parts)),
                like=passes.value(x),
            )
            for a in (normal, chi2)
        )
        strength = _strength_at(self.strength, state.count, dtype)
        shift, scale = analytic_noise(self, normal, chi2, unit, strength)
        empty = 0 in x.shape
        used = jnp.full((), not empty) if mask is None else jnp.any(mask)
        unsure = mask is not None or empty
        if unsure and self.axis_name is not None and state.count is not None:
            used = lax.psum(used.astype(jnp.float32), self.axis_name) > 0
        return passes.affine(x, shift, 1 / scale, dtype=self.dtype), _advanced(state, used)


def draw_analytic(
    method: AnalyticGhostNoise, key: jax.Array, shape: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Standard normal and chi-squared numbers for the samples of this device.

    A chi-squared number of N - 1 degrees of freedom is a sum of exponential ones, one for each pair
    of degrees, and the square of a normal one if a degree is left: the same in every precision, and
    without rejection. Words are those of one uniform number each, exact in float32.
    """
    first = 0 if method.axis_name is None else lax.axis_index(method.axis_name) * shape[0]
    rank = first + jnp.arange(shape[0], dtype=jnp.int32)

    def normal(number):  # of odd multiples of 2**-23 in (-1, 1)
        odd = (words(number) >> 9).astype(jnp.int32) * 2 + (1 - 2**23)
        return math.sqrt(2) * lax.erf_inv(odd.astype(dtype) * 2**-23)

    def exponential(number):  # of multiples of 2**-24 in (0, 1]
        return -2 * jnp.log(((words(number) >> 8) + 1).astype(dtype) * 2**-24)

    def words(number):
        return _words(jax.random.fold_in(key, number), rank, *shape[1:])

    def add(total, number):
        return total + exponential(number), None

    pairs, left = divmod(method.ghost_batch_size - 1, 2)
    chi2 = jnp.square(normal(1)) if left else jnp.zeros_like(normal(0))
    chi2, _ = lax.scan(add, chi2, jnp.arange(2, 2 + pairs))
    return normal(0), chi2


def analytic_noise(
    method: AnalyticGhostNoise, normal: jax.Array, chi2: jax.Array, unit: jax.Array, strength: Any
) -> tuple[jax.Array, jax.Array]:
    """Shift and scale of standard normal and chi-squared numbers."""
    size = method.ghost_batch_size
    shift, scale = normal * unit / math.sqrt(size), jnp.sqrt(chi2 / size)
    shift = jnp.zeros_like(shift) if method.noise == "scale" else shift
    scale = jnp.ones_like(scale) if method.noise == "shift" else scale
    shift, scale = _strengthened(shift, scale, strength)
    if method.unbiased_scale:
        scale = scale * expected_inverse(
            jnp.full((1,) * scale.ndim, 1 / size, scale.dtype), strength
        )
    return shift, scale
