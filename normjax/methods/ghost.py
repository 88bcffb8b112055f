"""Normalization of parts of the batch, and of samples by the other ones."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, groups, passes, running, seam, statistics
from normjax.core.checks import field
from normjax.core.fields import COUNT, Configuration
from normjax.core.method import Normalizer, Traits, feature_axes, parts, traits
from normjax.core.sharding import align, place, spec
from normjax.core.statistics import Moments, Parted
from normjax.core.structs import AffineParams, Axes, Features, Key, Mask, Running
from normjax.core.tracing import traced_once
from normjax.methods import batch
from normjax.methods.batch import BatchFields, BatchNorm, GhostFields

AVERAGED = "The updates of parts are averaged: take 'cumulative', or absorb what `observe` saw."
AVERAGES = "exponential", "debiased", "cumulative"


class EachPart(NamedTuple):
    """An input of `Ghost` that every part has one of its own of, stacked on axis 0.

    Wang et al., *Kalman Normalization*, 2018, https://arxiv.org/abs/1802.03133, whose public
    implementation predicts the statistics of every micro-batch apart.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> prior = nj.EachPart(nj.propagate.prediction(jnp.zeros((4, 3)), jnp.ones((4, 3))))
      >>> method, x = nj.Ghost(nj.KalmanNorm(), groups=4), jnp.arange(24.0).reshape(8, 3)
      >>> y, _ = method.apply(*method.init(None, 3), x, train=True, prior=prior)
    """

    value: Any  # a tree of arrays, [parts on this device, ...]


@dataclasses.dataclass(frozen=True)
class Ghost(Configuration):
    """Runs a method on equal parts of the batch in training; evaluation runs it once on all of it.

    Hoffer, Hubara & Soudry, *Train longer, generalize better*, 2017, Algorithm 1 (ghost batch
    normalization), https://arxiv.org/abs/1705.08741

    Parts are blocks of consecutive samples of the *global* batch: under the method's `axis_name`
    devices hold consecutive blocks of it, and either whole parts lie on a device, or whole devices
    share a part. Running statistics are the mean of what each part makes of the old ones; the paper
    moves them by one part after the other. Further inputs of samples (see `Traits.inputs`) are
    divided with the batch; others are the same for all parts, unless given as `EachPart`.

    Attributes:
      method: the method, such as `BatchNorm()`.
      groups: number of parts; divides the batch.
      running: whether running statistics move by the mean over "all" parts, or by the "first".

    Raises:
      ValueError: for a method that is none or whose average is "pooled", and for parts that do not
        fit the batch and the devices.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.Ghost(nj.BatchNorm(), groups=4), jnp.arange(24.0).reshape(8, 3)
      >>> y, state = method.apply(*method.init(None, 3), x, train=True)
    """

    method: Any = dataclasses.field(metadata=checks.rule(checks.method))
    groups: int = dataclasses.field(metadata=checks.rule(checks.positive))
    _: dataclasses.KW_ONLY
    running: Literal["all", "first"] = field("all", checks.one_of("all", "first"))

    def __post_init__(self):
        super().__post_init__()
        own, *inner = (getattr(m, "axis_name", None) for m in _all(self.method))
        wrong = None
        if getattr(self.method, "axis_index_groups", None) is not None:
            wrong = "the method has axis_index_groups: drop them, groups=N sets them."
        elif own is not None and not self.traits.trains:
            wrong = f"axis_name={own!r} of {type(self.method).__name__} divides samples: no Ghost."
        elif any(name is not None for name in inner):
            wrong = "a method inside of the method has an axis_name: put Ghost around that one."
        elif any(getattr(m, "running_average", None) == "pooled" for m in _all(self.method)):
            wrong = f"running_average='pooled'. {AVERAGED}"
        if wrong:
            raise ValueError(f"Ghost: {wrong}")

    @property
    def feature_axes(self) -> Axes:
        """The feature axes of the method."""
        return feature_axes(self.method)

    @property
    def traits(self) -> Traits:
        """The traits of the method."""
        return traits(self.method)

    def init(self, key: Key, features: Features) -> tuple[Any, Any]:
        """Those of the method."""
        return self.method.init(key, features)

    def apply(
        self,
        params: Any,
        state: Any,
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
        **inputs: Any,
    ) -> tuple[jax.Array, Any]:
        """Runs the method on each part; `mask` and inputs of samples are divided too.

        Every part draws with a key of its own; under a named axis give all devices the same `key`.
        """
        if not train:
            return self.method.apply(params, state, x, train=False, mask=mask, key=key, **inputs)
        parts = self.method, self.groups, self.running
        return _apply_to_parts(*parts, params, state, x, mask, key, **inputs)

    def observe(self, x: Any, mask: Mask = None, **inputs: Any) -> Any:
        """Statistics of the whole batch."""
        return self.method.observe(x, mask, **inputs)

    def evaluation(
        self, params: Any, state: Any, x: Any = None, mask: Mask = None, **inputs: Any
    ) -> Any:
        """That of the method."""
        return self.method.evaluation(params, state, x, mask, **inputs)

    def absorb(self, state: Any, seen: Any) -> Any:
        """The state moved by statistics of the whole batch."""
        return self.method.absorb(state, seen)


def _all(method):
    """`method` and all that it is made of."""
    return method, *(m for part in parts(method) for m in _all(part))


def _apply_to_parts(method, number, by, params, state, x, mask, key, **inputs):
    """Training of `Ghost(method, number, running=by)`; the number may be symbolic."""
    x = checks.as_real("Ghost", x)
    axis_name = getattr(method, "axis_name", None)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if devices > 1 and number % devices and devices % number:
        raise ValueError(f"Ghost: one of {number} groups, {devices} devices must divide the other.")
    first = lax.axis_index(axis_name) * number // devices if devices > 1 else 0
    keys = None
    if key is not None and traits(method).random:
        keys = jax.random.split(key, number)
        if devices > 1:
            keys = lax.dynamic_slice_in_dim(keys, first, max(number // devices, 1))
    if devices > 1 and number < devices:
        if by == "first" or not hasattr(method, "axis_index_groups"):
            raise ValueError(
                f"Ghost: groups={number} on {devices} devices: devices can share a group only with "
                "running='all' and a method with axis_index_groups. Give each one group or more."
            )
        shared = groups.neighbours(devices, devices // number)
        method = dataclasses.replace(method, axis_index_groups=shared)
        key = None if keys is None else keys[0]
        return method.apply(params, state, x, train=True, mask=mask, key=key, **inputs)

    here = number // devices
    method = method if devices == 1 else dataclasses.replace(method, axis_name=None)
    if x.ndim == 0 or x.shape[0] % here != 0:
        hint = f" {groups.pad_and_mask(-x.shape[0] % here)}" if x.ndim else ""
        raise ValueError(f"Ghost: {here} groups do not divide a batch of shape {x.shape}.{hint}")
    if (mask := checks.as_mask("Ghost", mask, x.shape)) is not None:
        mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))
    kinds = traits(method).inputs
    samples = {name: a for name, a in inputs.items() if kinds.get(name) == "sample"}
    each = {name: a.value for name, a in inputs.items() if isinstance(a, EachPart)}
    same = {name: a for name, a in inputs.items() if name not in (*samples, *each)}
    along = lambda a: place(a, (spec(x)[0], *spec(a)[1:]), like=x)
    mask, samples = jax.tree.map(along, (mask, samples))
    divided = jax.tree.map(lambda a: groups.split(a, 0, here), (x, mask, samples))
    part = spec(divided[0])[0]
    each, keys = jax.tree.map(lambda a: place(a, (part, *spec(a)[1:]), like=x), (each, keys))

    def run(divided, each, key):
        x, mask, samples = divided
        given = dict(mask=mask, key=key, **samples, **each, **same)
        return method.apply(params, state, x, train=True, **given)

    y, new = jax.vmap(run)(divided, each, keys)
    filled = jnp.ones(here, bool) if mask is None else jnp.any(divided[1], range(1, x.ndim + 1))
    if "weights" in samples:
        counts = divided[2]["weights"] > 0
        filled &= jnp.any(counts, range(1, counts.ndim))
    if by == "first":
        filled = filled & (jnp.arange(here, dtype=jnp.int32) + first == 0)
    filled, _ = align(filled, x)
    state = running.average_filled(state, new, filled, axis_name if devices > 1 else None)
    return groups.join(y, 0, like=x), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartFields(GhostFields):
    """The fields of norms of parts of the batch."""

    running_average: Literal["exponential", "debiased", "cumulative"] = field(
        "exponential", checks.one_of(*AVERAGES), hint=AVERAGED
    )


@dataclasses.dataclass(frozen=True)
class GhostBatchNorm(PartFields):
    """Batch normalization of consecutive parts of the batch: `Ghost(BatchNorm(...), groups)`.

    Hoffer, Hubara & Soudry, *Train longer, generalize better*, 2017, Algorithm 1,
    https://arxiv.org/abs/1705.08741, in the form of Kosson, Fan & Jaggi, *Ghost Noise for
    Regularizing Deep Neural Networks*, 2024, https://arxiv.org/abs/2305.17205: `ghost_batch_size`
    samples of the global batch share statistics, which move the running ones by their average.

    Attributes:
      ghost_batch_size: samples per part; divides the batch (else ValueError). None: all of it.
      axis_name: as in `Ghost`.
      axis_index_groups: must be None: `ghost_batch_size` makes the groups.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        activation, running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as
        in `BatchNorm`, with its errors; the samples lie on axis 0.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.GhostBatchNorm(2), jnp.arange(24.0).reshape(8, 3)
      >>> y, state = method.apply(*method.init(None, 3), x, train=True)
    """

    traits: ClassVar[Traits] = Traits()

    ghost_batch_size: int | None = dataclasses.field(metadata=checks.rule(COUNT))

    init, observe, evaluation, absorb = batch.init, batch.observe, batch.evaluation, running.absorb

    @traced_once
    def apply(
        self, params: Any, state: Any, x: Any, *, train: bool, mask: Mask = None, key: Key = None
    ) -> tuple[jax.Array, Any]:
        """Normalizes each part with its own statistics (`train=True`); see `BatchNorm.apply`."""
        if not train:
            return seam.evaluate(self, params, state, x, mask), state
        name, size = type(self).__name__, self.ghost_batch_size
        x = checks.as_real(name, x)
        if size == 1 and not checks.position_axes(self, x.shape):
            raise ValueError(
                f"{name}: ghost_batch_size=1 and an input of shape {x.shape} leave statistics over "
                "single values, whose variance is zero."
            )
        here, shared, devices = groups.ghosts(self, x.shape)
        plain = BatchNorm(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(BatchFields)}
        )
        number = len(shared) if shared else here * devices
        return _apply_to_parts(plain, number, "all", params, state, x, mask, key)


@dataclasses.dataclass(frozen=True)
class EvalNorm(PartFields):
    """`GhostBatchNorm` whose evaluation mixes a sample's own statistics into the running ones.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205, after Singh & Shrivastava, *EvalNorm*, 2019,
    https://arxiv.org/abs/1904.06031: in evaluation a sample has the share in its statistics that it
    has in training, one of N. With `a = own_weight`, over the valid positions of the sample,

        mean = (1 - a) * running mean + a * own mean
        var = (1 - a) * running var + a * own var + a * (1 - a) * (own mean - running mean)^2

    With 1 / N the mean is that expected in training. A sample without valid positions has the
    running statistics.

    Attributes:
      ghost_batch_size: samples per part in training, N; divides the batch.
      own_weight: "1/N", or "1/N^2" as in the public implementation (epfml/ghost-noise).
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: as in `GhostBatchNorm`, with its errors.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method = nj.EvalNorm(8)
      >>> y, _ = method.apply(*method.init(None, 3), jnp.ones((5, 4, 4, 3)), train=False)
    """

    traits: ClassVar[Traits] = Traits()

    ghost_batch_size: int = dataclasses.field(metadata=checks.rule(checks.positive))
    _: dataclasses.KW_ONLY
    own_weight: Literal["1/N", "1/N^2"] = field("1/N", checks.one_of("1/N", "1/N^2"))

    init, observe, absorb, apply = batch.init, batch.observe, running.absorb, GhostBatchNorm.apply

    def evaluation(
        self, params: AffineParams, state: Running, x: Any = None, mask: Mask = None
    ) -> Normalizer:
        """Normalizes by the mixed statistics of every sample; it cannot be folded."""
        if x is None:
            raise ValueError("EvalNorm: x=None, but evaluation has statistics of each sample.")
        x, mask = passes.inputs(self, x, mask)
        at = checks.as_axes("EvalNorm", "axis", self.axis, x.shape)
        own = passes.moments(x, checks.position_axes(self, x.shape), mask=mask)
        weight = 1 / self.ghost_batch_size ** (2 if self.own_weight == "1/N^2" else 1)
        weight = weight * (own.count > 0).astype(own.mean.dtype)
        mean, var = (passes.lift(a, at, x.ndim) for a in passes.as_wide(x, state.mean, state.var))
        gap = own.mean - mean
        var = var + weight * (own.var - var) + weight * (1 - weight) * jnp.square(gap)
        return batch.normalizer(self, params, mean + weight * gap, var)


@dataclasses.dataclass(frozen=True)
class ExclusiveBatchNorm(GhostFields):
    """Batch normalization of every sample by the statistics of the others.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205 (exclusive batch normalization, XBN).

    In training a sample's mean and variance are those of the other samples of its group of
    `ghost_batch_size` consecutive samples of the global batch, and gradients flow through them; the
    running statistics are those of the whole batch, and evaluation is that of `BatchNorm`. The
    public implementation (epfml/ghost-noise) subtracts squared means from mean squares; here a
    sample's share is taken off moments about the group's mean, which is exact at any offset. There
    evaluation always has epsilon 1e-5. The only valid sample of a group is normalized by its own
    statistics.

    Attributes:
      ghost_batch_size: samples per group, > 1, without positions > 2 (else ValueError). None: all.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: as in `GhostBatchNorm`, with its errors.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.ExclusiveBatchNorm(4), jnp.arange(24.0).reshape(8, 3)
      >>> y, state = method.apply(*method.init(None, 3), x, train=True)
    """

    traits: ClassVar[Traits] = Traits()

    ghost_batch_size: int | None = field(None, COUNT)

    init, evaluation, apply = batch.init, batch.evaluation, seam.apply
    absorb = running.absorb_whole

    def __post_init__(self):
        super().__post_init__()
        if self.ghost_batch_size == 1:
            raise ValueError("ExclusiveBatchNorm: ghost_batch_size=1 leaves no other samples.")

    def observe(self, x: Any, mask: Mask = None) -> Parted:
        """Moments of the batch [features]; `parts` has those of the others of every sample."""
        x, mask = passes.inputs(self, x, mask)
        positions = checks.position_axes(self, x.shape)
        here, shared, _ = groups.ghosts(self, x.shape)
        size = x.shape[0] // here * (len(shared[0]) if shared else 1)
        if size and size < (2 if positions else 3):
            raise ValueError(
                f"ExclusiveBatchNorm: ghost_batch_size={self.ghost_batch_size} and an input of "
                f"shape {x.shape} leave statistics over {size - 1} values: give one more sample, "
                "or positions."
            )
        own = passes.moments(x, positions, mask=mask)
        own = own._replace(count=place(own.count, spec(own.mean), like=own.mean))
        parts = Moments(*(groups.split(a, 0, here) for a in own))
        group = statistics.merge(parts, 1)
        if shared is None:
            total = statistics.merge(group)
            if self.axis_name is not None:
                total, _ = statistics.over_devices(total, self.axis_name)
        else:
            group = Moments(*(a[0] for a in group))
            both: Any = statistics.over_devices(group, self.axis_name, shared)
            group, total = Moments(*(a[None] for a in both[0])), statistics.merge(both[1])
        rest = _leave_one_out(parts, Moments(*(a[:, None] for a in group)))
        rest = Moments(*(groups.join(a, 0, like=own.mean) for a in rest))
        over = tuple(i - 1 for i in positions)
        return Parted(*(jnp.squeeze(a, over) for a in total), parts=rest)

    def coefficients(
        self, params: AffineParams, state: Running, seen: Parted, *, key: Key = None
    ) -> Normalizer:
        """Normalizes every sample by the statistics of the others."""
        return batch.normalizer(self, params, seen.parts.mean, seen.parts.var)


def _leave_one_out(own: Moments, group: Moments) -> Moments:
    """Moments of `group` without each of its members `own`."""
    count = group.count - own.count
    share = own.count / jnp.maximum(count, 1)
    gap = own.mean - group.mean
    shift = share * gap
    square = group.var + share * (group.var - own.var - jnp.square(gap))
    var = jnp.maximum(square - jnp.square(shift), 0)
    alone = count == 0
    mean, var = jnp.where(alone, own.mean, group.mean - shift), jnp.where(alone, own.var, var)
    return Moments(count, mean, var)
