"""Whitening: batch normalization by a matrix, which makes features uncorrelated too.

Every method takes mean and covariance S of groups of features over the batch, and gives `scale *
W (x - mean) + bias` with `W S W^T` near the identity. They differ in W: the symmetric root of 1 / S
by an eigendecomposition, an inverse Cholesky factor, some steps of an iteration, or a matrix that
each batch moves by a small step.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, groups, matrices, passes, roots, running, statistics
from normjax.core.checks import field
from normjax.core.fields import COUNT, DTYPE, ActivationFields, Schedule
from normjax.core.method import Linear, Normalizer, Traits, feature_positions
from normjax.core.sharding import place_like
from normjax.core.statistics import Covariances, Parted
from normjax.core.structs import AffineParams, Features, Key, Mask, affine_params
from normjax.core.tracing import traced_once
from normjax.methods import batch
from normjax.methods.batch import BatchFields

ROOT = roots.steps_of("cubic", 10, 5, 1e6)  # to rounding, up to a condition number of 1e6
WEIGHTED = Traits(inputs={"weights": "sample"})


class Whitening(NamedTuple):
    """Running statistics of groups of features; the method says which are kept.

    Huang et al., 2018, https://arxiv.org/abs/1804.08450, average the matrices, or the covariances.

    Example:
      >>> import normjax as nj
      >>> _, state = nj.IterativeNorm(group_size=2).init(None, 6)
      >>> state.mean.shape, state.cov.shape, state.matrix
      ((6,), (3, 2, 2), None)
    """

    mean: jax.Array  # f32[features]; with `shared_matrix` f32[group_size]
    var: jax.Array | None = None  # f32[features]
    cov: jax.Array | None = None  # f32[groups, group_size, group_size]
    matrix: jax.Array | None = None  # f32[groups, group_size, group_size]
    count: jax.Array | None = None  # f32[], of updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhiteningFields(BatchFields):
    """The fields of methods that whiten groups of features.

    Groups are those of Huang et al., 2018, https://arxiv.org/abs/1804.08450.
    """

    running_average: Literal["exponential", "debiased", "cumulative"] = field(
        "exponential",
        checks.one_of("exponential", "debiased", "cumulative"),
        hint="For the statistics of all that was seen `pool` what `observe` gives.",
    )
    group_size: int | None = field(64, COUNT)
    last_group: Literal["equal", "smaller"] = field("equal", checks.one_of("equal", "smaller"))
    shrinkage: float = field(0.0, checks.interval(0, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootFields(WhiteningFields):
    """The fields of methods that whiten by a root of the covariance of the batch.

    Huang et al., 2018, https://arxiv.org/abs/1804.08450, and 2019, https://arxiv.org/abs/1904.03441.
    """

    stored: Literal["covariance", "matrix"] = field(
        "covariance", checks.one_of("covariance", "matrix")
    )
    shared_matrix: bool = field(False, checks.flag)
    shuffle: bool = field(False, checks.flag)

    def __post_init__(self):
        super().__post_init__()
        fields = {name: getattr(self, name) for name in ("stored", "shared_matrix", "last_group")}
        plain = {"stored": "covariance", "shared_matrix": False, "last_group": "equal"}
        odd = [f"{k}={v!r}" for k, v in fields.items() if v != plain[k]]
        if self.shuffle and odd:
            raise ValueError(f"{type(self).__name__}: shuffle=True, whose groups change: no {odd}.")
        if self.shared_matrix and self.last_group == "smaller":
            raise ValueError(f"{type(self).__name__}: shared_matrix=True needs groups of one size.")
        if self.unbiased_running_var and self.stored == "matrix":
            raise ValueError(
                f"{type(self).__name__}: unbiased_running_var=True, but stored='matrix' keeps no "
                "covariance."
            )

    @property
    def traits(self) -> Traits:
        """Random if the groups are; takes weights."""
        return dataclasses.replace(WEIGHTED, random=self.shuffle)


def size_of(method: WhiteningFields, features: int) -> int:
    """How many features make a group; ValueError unless groups of one size make all of them."""
    size = method.group_size
    if size is None or features <= size:
        return features
    if features % size and method.last_group == "equal":
        raise ValueError(
            f"{type(method).__name__}: group_size={size} does not divide {features} features. Give "
            "a size that does, or last_group='smaller'."
        )
    return size


def identities(features: int, size: int, dtype: Any) -> jax.Array:
    """An identity for each group, [groups, size, size]: zero for what the last group lacks."""
    number = -(-features // size)
    present = jnp.arange(number * size, dtype=jnp.int32).reshape(number, size, 1) < features
    return present.astype(dtype) * jnp.eye(size, dtype=dtype)[None]


def observe(
    method: WhiteningFields, x: Any, mask: Mask = None, weights: Any = None
) -> Covariances | Parted:
    """Mean and covariance of each group of features, over batch, positions and devices.

    Their shapes are [groups, size] and [groups, size, size]; with a shared matrix there is one
    group, and of shuffled groups one of all features. With `axis_index_groups` they are those of
    the group of this device, and `parts` has those of every group of devices.
    """
    x, mask = passes.inputs(method, x, mask, weights)
    batch.positions(method, x.shape)
    at, size = _where(method, x)
    if mask is not None and any(mask.shape[i] != 1 for i in at):
        raise ValueError(
            f"{type(method).__name__}: a mask or weights of shape {mask.shape} vary along the "
            f"features {at} of an input of shape {x.shape}, but a covariance is of whole vectors: "
            "give them size one there."
        )
    diagonal = isinstance(method, StochasticWhiteningBatchNorm)
    seen = matrices.covariances(x, (at, size), mask=mask, diagonal=diagonal)
    if getattr(method, "shared_matrix", False):
        seen = jax.tree.map(lambda a: a[None], statistics.merge(seen))
    if method.axis_name is None:
        return seen
    own, parts = statistics.over_devices(seen, method.axis_name, method.axis_index_groups)
    return own if parts is None else Parted(own.count, own.mean, own.cov, parts)


def _where(method, x):
    """The feature axes of `x`, and how many features have statistics together."""
    at = feature_positions(method, x.shape)
    features = math.prod(x.shape[i] for i in at)
    return at, features if getattr(method, "shuffle", False) else size_of(method, features)


@traced_once
def apply(
    self: Any,
    params: AffineParams,
    state: Whitening,
    x: jax.Array,
    *,
    train: bool,
    mask: Mask = None,
    weights: Any = None,
    key: Key = None,
) -> tuple[jax.Array, Whitening]:
    """Whitens real `x` by its own statistics (`train=True`) or by the running ones.

    As `BatchNorm.apply`, but that `mask` and `weights` have size one along the features. `key`
    deals the groups where they are shuffled.
    """
    x, mask = passes.inputs(self, x, mask, weights)
    at = _require_variables(self, params, state, x)
    if train:
        seen = self.observe(x, mask)
        linear, state = self.coefficients(params, state, seen, key=key), self.absorb(state, seen)
    else:
        linear = self.evaluation(params, state, x, mask)
    where = at, linear.matrix.shape[-1]
    how: Any = dict(activation=self.epilogue(), dtype=self.dtype)
    y = matrices.mix(x, linear.mean, linear.matrix, linear.bias, where, **how)
    return y, state


def _require_variables(method, params, state, x):
    """The feature axes of `x`; ValueError unless parameters and state fit them and the fields."""
    name, at = type(method).__name__, feature_positions(method, x.shape)
    checks.require_features(name, "axis", at, x.shape, (params.scale, params.bias))
    sizes = tuple(x.shape[i] for i in at)
    wanted: Any = jax.eval_shape(lambda: method.init(jax.random.key(0), sizes)[1])
    shapes = [[None if a is None else tuple(a.shape) for a in tree] for tree in (state, wanted)]
    for leaf, has, needs in zip(state._fields, *shapes, strict=True):
        if has != needs:
            raise ValueError(
                f"{name}: `{leaf}` of the state has shape {has}, but the method needs {needs} for "
                f"an input of shape {x.shape} (None: no such leaf)."
            )
    return at


def _scaled(params, matrix):
    """`matrix` with the learned scale behind it."""
    if params.scale is None:
        return matrix
    scale = matrices.block_features(params.scale.astype(matrix.dtype), matrix.shape[-1])
    return matrix * scale[..., None]


def _shrunk(method, cov, eye):
    """`(1 - s) S + s trace(S) / d I` of groups of d features."""
    if not method.shrinkage:
        return cov
    level = jnp.trace(cov, axis1=1, axis2=2) / jnp.trace(eye, axis1=1, axis2=2)
    return (1 - method.shrinkage) * cov + method.shrinkage * level[:, None, None] * eye


def _absorb(method, state, seen, update):
    """The state with the leaves that `update(seen)` gives, each with the weight of its old value.

    Groups without samples keep theirs. The updates of parts of the batch are averaged.
    """
    if isinstance(seen, Parted):
        each = jax.vmap(lambda part: _absorb(method, state, part, update))(seen.parts)
        return running.average_filled(state, each, running.filled(seen.parts))
    seen = lax.stop_gradient(seen)
    valid = seen.count > 0
    if method.skip_nonfinite:
        valid &= jnp.isfinite(seen.mean).all(1) & jnp.isfinite(seen.cov).all((1, 2))
    keep = running.weight(method, state.count, state.mean.dtype)
    new = {"mean": (_features(seen.mean, state.mean), keep)} | update(seen, keep)
    size, leaves = seen.mean.shape[-1], {}
    of_features = _features(jnp.repeat(valid, size), state.mean)
    for name, (value, share) in new.items():
        old = getattr(state, name)
        where = of_features if name in ("mean", "var") else valid[:, None, None]
        value, where = (place_like(a, old) for a in (value.astype(old.dtype), where))
        leaves[name] = running.blend(share, old, value, where)
    if state.count is not None:
        leaves["count"] = state.count + jnp.any(valid).astype(state.count.dtype)
    return state._replace(**leaves)


def _features(a, like):
    """Numbers of the features of groups, with the shape of a leaf `like`."""
    return matrices.unblock_features(a, like.shape)


def _stored(method, seen, a):
    """What is recorded of a variance or covariance."""
    if not method.unbiased_running_var:
        return a
    count = seen.count.reshape(-1, *(1,) * (a.ndim - 1))
    return a * (jnp.maximum(count, 1) / jnp.maximum(count - 1, 1))


def init(method: RootFields, key: Key, features: Features) -> tuple[AffineParams, Whitening]:
    """Scale and bias (`param_dtype`) [features]; mean 0 [features], and identities (float32)."""
    sizes = checks.as_features(type(method).__name__, features)
    number = math.prod(sizes)
    size = size_of(method, number)
    if method.shared_matrix:
        sizes_of_mean, eye = (size,), identities(size, size, jnp.float32)
    else:
        sizes_of_mean = sizes
        eye = identities(number, number if method.shuffle else size, jnp.float32)
    count = jnp.zeros((), jnp.float32) if running.counts(method) else None
    leaf = {"covariance": "cov", "matrix": "matrix"}[method.stored]
    state = Whitening(jnp.zeros(sizes_of_mean, jnp.float32), count=count, **{leaf: eye})
    return affine_params(method, key, sizes), state


def _groups(method, features, cov, key=None):
    """Covariances of groups with shrinkage and epsilon, their identities, and what to do after.

    That puts matrices of shuffled groups together to one of all features: the groups that `key`
    deals; None: the consecutive ones.
    """
    size, join = cov.shape[-1], lambda a: a
    if method.shuffle:
        size, every = size_of(method, features), jnp.arange(features, dtype=jnp.int32)
        dealt = every if key is None else jax.random.permutation(key, every)
        pairs = dealt.reshape(-1, size, 1), dealt.reshape(-1, 1, size)
        whole, cov = jnp.zeros_like(cov[0]), cov[0][pairs]
        join = lambda a: whole.at[pairs].set(a)[None]
    eye = identities(features, size, cov.dtype)
    present = jnp.diagonal(eye, axis1=1, axis2=2)
    cov = cov * present[:, :, None] * present[:, None, :]
    return _shrunk(method, cov, eye) + method.epsilon * eye, eye, join


def _matrix(method, state, cov, key=None):
    cov, eye, join = _groups(method, state.mean.size, cov, key)
    return join(method.root(cov, eye))


def residual(method: Any, state: Whitening, seen: Covariances | Parted) -> jax.Array:
    """`I - W S W^T` for what `observe` saw, [groups, size, size]: zero where the output is white.

    S is with shrinkage and epsilon; of shuffled groups it is that of consecutive ones, at its place
    in one matrix of all features.
    """
    cov, eye, join = _groups(method, state.mean.size, seen[2])
    matrix = method.root(cov, eye)
    return join(eye - roots.product(roots.product(matrix, cov), matrix.mT))


def coefficients(
    method: Any, params: AffineParams, state: Whitening, seen: Any, *, key: Key = None
) -> Linear:
    """Whitens by the covariance of the batch; scales are in the matrix, [groups, size, size]."""
    mean, cov = seen[1:3]
    if method.constant_statistics:
        mean, cov = lax.stop_gradient((mean, cov))
    if method.shuffle:
        key = checks.require_key(type(method).__name__, key)
    matrix = _matrix(method, state, cov, key)
    return Linear(mean, _scaled(params, matrix), params.bias)


def evaluation(
    method: Any, params: AffineParams, state: Whitening, x: Any = None, mask: Mask = None
) -> Linear:
    """Whitens by the running statistics; `x` and `mask` change nothing."""
    state = _whole(state, x)
    matrix = state.matrix
    if matrix is None:
        matrix = _matrix(method, state, state.cov)
    mean = matrices.block_features(state.mean, matrix.shape[-1])
    return Linear(mean, _scaled(params, matrix), params.bias)


def _whole(state, x):
    """The state on every device, in the dtype of statistics for `x`."""
    wide = lambda a: a if x is None else passes.as_wide(x, a)[0]
    return jax.tree.map(lambda a: matrices.everywhere(wide(a)), state)


def absorb(method: Any, state: Whitening, seen: Covariances | Parted) -> Whitening:
    """The running statistics moved by those of the batch."""

    def update(seen, keep):
        if method.stored == "covariance":
            return {"cov": (_stored(method, seen, seen.cov), keep)}
        return {"matrix": (_matrix(method, state, seen.cov), keep)}

    return _absorb(method, state, seen, update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecorrelatedBatchNorm(RootFields):
    """Decorrelated batch normalization: `W = (S + epsilon I)^(-1/2)`, the symmetric root (ZCA).

    Huang, Yang, Lang & Deng, *Decorrelated Batch Normalization*, 2018, section 3,
    https://arxiv.org/abs/1804.08450

    Of all matrices that whiten, the symmetric one changes the input least, and does not jump with
    the order of eigenvalues as that of PCA does. Its gradient needs no `1 / (a - b)` of eigenvalues
    a, b, and is finite where they are equal. The public re-implementation
    (huangleiBuaa/IterNorm-pytorch, `dbn.py`) does as `shared_matrix=True, stored="matrix"`, its
    second version as `shared_matrix=True`, with epsilon in the stored covariance; its argument
    `num_groups` is the group size.

    Attributes:
      group_size: features in a group; None: all. A layer with at most so many is one group. With
        fewer samples and positions than features in a group only epsilon holds the root up.
      last_group: "equal": `group_size` divides the features. "smaller": the last group has what is
        left, and in the state and in `observe` zeros for what it lacks.
      shrinkage: s in [0, 1]: S becomes `(1 - s) S + s trace(S) / d I` in groups of d features,
        which bounds the condition number at any scale of the input.
      stored: "covariance": the running average of the covariance, whose root evaluation takes.
        "matrix": that of W, as the authors do; its evaluation is not that of the average
        covariance, and the output there has variances below one.
      shared_matrix: one mean and covariance for all groups, whose vectors are pooled.
      shuffle: deal the features to groups anew in every training step, by `key` (as CW-RGP does,
        Weng et al. 2022, https://arxiv.org/abs/2210.03586); evaluation has consecutive groups.
        Statistics are of all features, and the matrix is one of all: the cost is that of one group.
        Under a named axis give all devices the same `key`.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: as in `BatchNorm`, with the covariance for the
        variance; no "pooled" average, no segments. Several feature axes count as one.

    Raises:
      ValueError: for fields that contradict each other, a `group_size` that does not divide the
        features, a mask that varies along the features, and as in `BatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (8, 4, 4, 6))
      >>> method = nj.DecorrelatedBatchNorm(group_size=3)
      >>> y, state = method.apply(*method.init(None, 6), x, train=True)
    """

    init, observe, coefficients, evaluation = init, observe, coefficients, evaluation
    absorb, apply, residual = absorb, apply, residual

    def root(self, cov: jax.Array, eye: jax.Array) -> jax.Array:
        """The symmetric root; what is no feature counts as one of variance one."""
        return roots.zca(cov + roots.identity_like(eye) - eye) * _pairs(eye)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CholeskyBatchNorm(RootFields):
    """Batch normalization by an inverse Cholesky factor: `S + epsilon I = L L^T`, `W = L^-1`.

    Siarohin, Sangineto & Sebe, *Whitening and Coloring Batch Transform for GANs*, 2019,
    https://arxiv.org/abs/1806.00420, section 3.1

    The cheapest root that makes the output white. It depends on the order of the features: the
    first of a group is only scaled, the last is what the others do not predict.

    Attributes:
      group_size, last_group, shrinkage, stored, shared_matrix, shuffle: as in
        `DecorrelatedBatchNorm`.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: likewise.

    Raises:
      ValueError: as in `DecorrelatedBatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (8, 4, 4, 6))
      >>> method = nj.CholeskyBatchNorm(group_size=3)
      >>> y, state = method.apply(*method.init(None, 6), x, train=True)
    """

    init, observe, coefficients, evaluation = init, observe, coefficients, evaluation
    absorb, apply, residual = absorb, apply, residual

    def root(self, cov: jax.Array, eye: jax.Array) -> jax.Array:
        """The inverse factor; what is no feature counts as one of variance one."""
        return roots.cholesky(cov + roots.identity_like(eye) - eye) * _pairs(eye)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterativeNorm(RootFields):
    """Iterative normalization: some Newton-Schulz steps towards `(S + epsilon I)^(-1/2)`.

    Huang, Zhou, Zhu, Liu & Shao, *Iterative Normalization: Beyond Standardization towards Efficient
    Whitening*, 2019, Algorithm 1, https://arxiv.org/abs/1904.03441

    `S_n = S / trace(S)`, `P_0 = I`, `P_k+1 = (3 P_k - P_k^3 S_n) / 2`, `W = P_T / sqrt(trace(S))`.
    Few steps whiten in part: a small eigenvalue of S_n grows by 9 / 4 in each. White input of 64
    features keeps a deviation of 0.77 after five. The steps are in a coupled form that is the same
    in exact arithmetic and whose rounding does not grow (`roots.newton_schulz`); as published, the
    iteration diverges from some 15 steps on. The authors store W (`stored="matrix"`) with momentum
    0.9; if `group_size` does not divide the features, one of their versions halves it until it
    does, and the other is `last_group="smaller"`.

    Attributes:
      steps: T, of all steps, >= 0.
      iteration: "cubic", the paper's polynomial; "quintic", `P (15 I - 10 M + 3 M^2) / 8` with
        `M = P^2 S_n`, which takes fewer products to the same distance; "published", the cubic one
        as it stands, for at most seven steps (else ValueError).
      scaling: by what S is divided: "trace"; "frobenius", its norm; "power", a bound by power
        iteration, at most d^(1/16) times the largest eigenvalue: closer ones need fewer steps.
      minimax_steps: how many of the steps, the first, take instead the best polynomials of degree
        five for a range of eigenvalues. With `scaling="power"`, four of them and three cubic ones
        (22 products) whiten to 1e-4 what takes 20 cubic steps by the trace.
      condition: the ratio of the scale to the smallest eigenvalue for which they are made, >= 1.
      group_size, last_group, shrinkage, stored, shared_matrix, shuffle: as in
        `DecorrelatedBatchNorm`.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: likewise.

    Raises:
      ValueError: for more steps than are safe, and as in `DecorrelatedBatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (8, 4, 4, 6))
      >>> method = nj.IterativeNorm(steps=7, group_size=3)
      >>> y, state = method.apply(*method.init(None, 6), x, train=True)
    """

    steps: int = field(5, checks.natural)
    iteration: Literal["cubic", "quintic", "published"] = field(
        "cubic", checks.one_of("cubic", "quintic", "published")
    )
    scaling: Literal["trace", "frobenius", "power"] = field(
        "trace", checks.one_of("trace", "frobenius", "power")
    )
    minimax_steps: int = field(0, checks.natural)
    condition: float = field(1e4, checks.interval(1))

    init, observe, coefficients, evaluation = init, observe, coefficients, evaluation
    absorb, apply, residual = absorb, apply, residual

    def __post_init__(self):
        super().__post_init__()
        wrong = None
        if self.minimax_steps > self.steps:
            wrong = f"minimax_steps={self.minimax_steps} are more than steps={self.steps}"
        elif self.iteration == "published" and self.steps > roots.SAFE_STEPS:
            wrong = (
                f"steps={self.steps} with iteration='published', whose rounding takes over beyond "
                f"{roots.SAFE_STEPS}: take iteration='cubic', the same steps in a stable form"
            )
        elif self.iteration == "published" and (self.minimax_steps or self.scaling != "trace"):
            wrong = "iteration='published' has no minimax_steps, and scaling='trace'"
        if wrong:
            raise ValueError(f"{type(self).__name__}: {wrong}.")

    def root(self, cov: jax.Array, eye: jax.Array) -> jax.Array:
        """What the steps make of the root; reverse mode makes them again, and keeps `cov`."""
        if self.iteration == "published":
            run = functools.partial(roots.published, steps=self.steps)
        else:
            first = self.minimax_steps
            steps = roots.steps_of(self.iteration, self.steps, first, self.condition)
            run = functools.partial(roots.newton_schulz, steps=steps, scaling=self.scaling)
        return jax.checkpoint(run)(cov) * _pairs(eye)


def _pairs(eye):
    """One where row and column are features of the group."""
    present = jnp.diagonal(eye, axis1=1, axis2=2)
    return present[:, :, None] * present[:, None, :]


def largest_rate(condition: float) -> float:
    """The bound of `alpha` below which stochastic whitening by "kl" converges on one covariance.

    `4 / (2 + sqrt(k) + 1 / sqrt(k))` for correlations of condition number k: the step of W near
    `C^(-1/2)` multiplies the deviation of two eigendirections by `1 - alpha (2 + r + 1 / r) / 2`,
    where r^2 is the ratio of their eigenvalues.

    Example:
      >>> import normjax as nj
      >>> nj.largest_rate(1.0), round(nj.largest_rate(100.0), 3)
      (1.0, 0.331)
    """
    root = math.sqrt(condition)
    return 4 / (2 + root + 1 / root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StochasticWhiteningBatchNorm(WhiteningFields):
    """Stochastic whitening batch normalization: a matrix that each batch moves by a small step.

    Zhang, Nezhadarya, Fashandi, Liu, Graham & Shah, *Stochastic Whitening Batch Normalization*,
    2021, Algorithm 1, https://arxiv.org/abs/2106.04413

    The input is standardized as in batch normalization, `x_s = (x - mean) / sqrt(var + epsilon)`.
    With its correlations C, W moves by `W - alpha D`, with `E = W C W^T - I` and `D = E W` (KL) or
    `D = E W C / |E|` (Frobenius; no step where E is zero or rounding), and is made symmetric. The
    output is `scale * W x_s + bias` with the new W. W is a constant of the backward pass; mean and
    variance are not. Evaluation takes the running mean and variance and W as it is.

    The step of KL moves `W^-2` towards C by the share 2 alpha, up to alpha^2: W is the inverse root
    of a moving average of C (`form="covariance"` is that itself, and stable at every rate). After a
    sum t of rates an eigenvalue c of C has become `c / (c - (c - 1) exp(-2 t))` in the output: with
    the paper's alpha and schedule whitening stays partial. The public implementation
    (lucanunz/Stochastic-Whitening-Batch-Normalization) has epsilon 1e-8 and momentum 0.95.

    Attributes:
      criterion: "kl" or "frobenius", whose steps have one length and do not settle below alpha.
      alpha: the rate, >= 0, or a schedule (a function of the number of updates, such as those of
        optax; the paper keeps it proportional to the learning rate), which adds a leaf `count` to
        the state. With zero W stays the identity: batch normalization.
      half_life: in steps, in place of alpha: `alpha = ln(2) / (2 half_life)`; after so many the old
        correlations weigh one half.
      form: "update", the paper's; "covariance": the moving average of C, in the state, and its
        symmetric root by 35 products (for "kl"; alpha at most 1/2).
      condition: largest condition number of C for which alpha is to be stable, >= 1; an alpha at or
        above `largest_rate(condition)` is a ValueError (for "kl" and "update"). Shrinkage s bounds
        it by d / s in groups of d features.
      group_size: features in a group; None, the paper's: all of them.
      shrinkage: s in [0, 1]: C becomes `(1 - s) C + s trace(C) / d I`.
      last_group: as in `DecorrelatedBatchNorm`.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: as in `BatchNorm`; no "pooled" average, no segments.

    Raises:
      ValueError: for an alpha above its bound, fields that contradict each other, and as in
        `DecorrelatedBatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (8, 4, 4, 6))
      >>> method = nj.StochasticWhiteningBatchNorm(half_life=1000.0)
      >>> y, state = method.apply(*method.init(None, 6), x, train=True)
    """

    traits: ClassVar[Traits] = WEIGHTED

    group_size: int | None = field(None, COUNT)
    criterion: Literal["kl", "frobenius"] = field("kl", checks.one_of("kl", "frobenius"))
    alpha: Schedule = field(1e-5, checks.interval(0), schedule=True)
    half_life: float | None = field(None, checks.optional(checks.interval(0, open=True)))
    form: Literal["update", "covariance"] = field("update", checks.one_of("update", "covariance"))
    condition: float = field(1.0, checks.interval(1))

    observe, apply = observe, apply

    def __post_init__(self):
        super().__post_init__()
        wrong, alpha = None, self._rate(None)
        if self.half_life is not None and self.alpha != 1e-5:
            wrong = f"alpha={self.alpha!r} and half_life={self.half_life}: give one of them"
        elif self.form == "covariance" and self.criterion != "kl":
            wrong = "form='covariance' is that of criterion='kl'"
        elif self.form == "covariance" and alpha is not None and alpha > 0.5:
            wrong = f"alpha={alpha:g} of form='covariance' is the half of a share: at most 1/2"
        elif self.form == "update" and self.criterion == "kl" and alpha is not None:
            bound = largest_rate(self.condition)
            if alpha >= bound:
                wrong = (
                    f"alpha={alpha:g} does not converge for correlations of condition number "
                    f"{self.condition:g}: below {bound:.3g} it does; form='covariance' always does"
                )
        if wrong:
            raise ValueError(f"{type(self).__name__}: {wrong}.")

    def _rate(self, count):
        """alpha; None: that of a schedule, before its first update."""
        if self.half_life is not None:
            return math.log(2) / (2 * self.half_life)
        if not callable(self.alpha):
            return self.alpha
        return None if count is None else self.alpha(count)

    def init(self, key: Key, features: Features) -> tuple[AffineParams, Whitening]:
        """Scale and bias (`param_dtype`); mean 0, variance 1, and identities (float32).

        W, or the average correlation, has the shape [groups, size, size], the others [features].
        """
        sizes = checks.as_features(type(self).__name__, features)
        number = math.prod(sizes)
        state = running.init(self, sizes)
        leaf = {"update": "matrix", "covariance": "cov"}[self.form]
        eye = identities(number, size_of(self, number), jnp.float32)
        own = Whitening(state.mean, state.var, count=state.count, **{leaf: eye})
        return affine_params(self, key, sizes), own

    def _moved(self, state, seen):
        """The leaf of the state that says how to whiten, moved by a batch; and W."""
        old = state.cov if state.matrix is None else state.matrix
        seen = lax.stop_gradient(seen)
        cov, old = (matrices.everywhere(a.astype(seen.cov.dtype)) for a in (seen.cov, old))
        eye = identities(state.mean.size, cov.shape[-1], cov.dtype)
        old *= _pairs(eye)
        inverse = lax.rsqrt(jnp.diagonal(cov, axis1=1, axis2=2) + self.epsilon)
        corr = _shrunk(self, cov * inverse[:, :, None] * inverse[:, None, :], eye)
        alpha = jnp.asarray(self._rate(state.count), cov.dtype)
        if self.form == "covariance":
            new = (1 - 2 * alpha) * old + 2 * alpha * corr
        else:
            error = roots.product(roots.product(old, corr), old.mT) - eye
            step = roots.product(error, old)
            if self.criterion == "frobenius":
                size = jnp.linalg.norm(error, axis=(1, 2), keepdims=True)
                rounding = 4 * cov.shape[-1] * jnp.finfo(cov.dtype).eps
                share = jnp.where(size > rounding, 1 / statistics.divisor(size), 0)
                step = roots.product(step, corr) * share
            new = old - alpha * step
            new = (new + new.mT) / 2
        return jnp.where(seen.count[:, None, None] > 0, new, old)

    def _whitener(self, moved, features):
        """W for what the state keeps."""
        if self.form == "update":
            return moved
        eye = identities(features, moved.shape[-1], moved.dtype)
        return roots.newton_schulz(moved * _pairs(eye), ROOT, "power") * _pairs(eye)

    def coefficients(
        self, params: AffineParams, state: Whitening, seen: Any, *, key: Key = None
    ) -> Linear:
        """Whitens by the matrix that the batch has moved, and its mean and variance."""
        seen = Covariances(*seen[:3])
        matrix = self._whitener(self._moved(state, seen), state.mean.size)
        mean, var = seen.mean, jnp.diagonal(seen.cov, axis1=1, axis2=2)
        if self.constant_statistics:
            mean, var = lax.stop_gradient((mean, var))
        return self._linear(params, mean, var, matrix)

    def _linear(self, params, mean, var, matrix):
        inverse = passes.inverse_deviation(var, self.epsilon)
        return Linear(mean, _scaled(params, matrix * inverse[:, None, :]), params.bias)

    def evaluation(
        self, params: AffineParams, state: Whitening, x: Any = None, mask: Mask = None
    ) -> Linear:
        """Whitens by the running statistics; `x` and `mask` change nothing."""
        of: Any = _whole(state, x)
        kept = of.cov if of.matrix is None else of.matrix
        matrix = self._whitener(kept, of.mean.size)
        mean, var = (matrices.block_features(a, kept.shape[-1]) for a in (of.mean, of.var))
        return self._linear(params, mean, var, matrix)

    def absorb(self, state: Whitening, seen: Covariances | Parted) -> Whitening:
        """The running statistics, and the matrix, moved by those of the batch."""

        def update(seen, keep):
            var = jnp.diagonal(seen.cov, axis1=1, axis2=2)
            var = _features(_stored(self, seen, var), state.var)
            leaf = "cov" if state.matrix is None else "matrix"
            return {"var": (var, keep), leaf: (self._moved(state, seen), jnp.zeros_like(keep))}

        return _absorb(self, state, seen, update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleWhitening(ActivationFields):
    """Whitening of samples: what is uncorrelated are the samples of a batch, not the features.

    Weng, Huang, Zhao, Anwer, Khan & Khan, *An Investigation into Whitening Loss for Self-supervised
    Learning*, 2022, https://arxiv.org/abs/2210.03586, whose public implementation whitens either.

    The mean of a sample and the covariance of two are over their positions and features, of which
    there should be more than samples in a group; the output is `W (x - mean)` with the symmetric
    root W of each group of consecutive samples. Training and evaluation are the same, with no
    running statistics and no parameters: `chain(SampleWhitening(), Affine())` has these. Samples
    see those of their group, so that a device needs whole groups.

    Attributes:
      group_size: samples in a group, which divides the batch; None: all.
      steps: None: an eigendecomposition; T >= 0: so many steps of `IterativeNorm`.
      epsilon: added to the variances, >= 0.
      dtype: dtype of the output; None: that of the input.
      activation: pointwise function of the output; the backward pass then keeps only `x`.

    Raises:
      ValueError: for a `group_size` that does not divide the batch, a single position and feature,
        and a mask that is neither of whole samples nor the same for all.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.SampleWhitening(group_size=4)
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> y, _ = method.apply(*method.init(None, 64), x, train=True)
      >>> bool(abs(y[0] @ y[1]) < 1e-3)
      True
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    group_size: int | None = field(None, COUNT)
    steps: int | None = field(None, checks.optional(checks.natural))
    epsilon: float = field(1e-5, checks.interval(0))
    dtype: Any = field(None, DTYPE)

    def init(self, key: Key, features: Features) -> tuple[tuple[()], tuple[()]]:
        """Neither parameters nor state."""
        checks.as_features(type(self).__name__, features)
        return (), ()

    def check_training(self, x: Any) -> None:
        """ValueError for samples of a single value."""
        shape = jnp.shape(x)
        if math.prod(shape[1:]) == 1:
            raise ValueError(
                f"{type(self).__name__}: samples of an input of shape {shape} are single values, "
                "whose covariances are zero."
            )

    @traced_once
    def apply(
        self,
        params: tuple[()],
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Whitens the samples of real `x`, [batch, ...]; masked ones take no part."""
        del train, key
        name = type(self).__name__
        x, mask = passes.inputs(self, x, mask)
        if x.ndim < 2:
            raise ValueError(f"{name}: an input of shape {x.shape} has no samples of features.")
        batch_size = x.shape[0]
        size = batch_size if self.group_size is None else self.group_size
        if size and batch_size % size:
            raise ValueError(
                f"{name}: group_size={size} does not divide a batch of {batch_size} samples. Pad "
                "the batch, and mask the padding."
            )
        of_samples = mask is not None and all(n == 1 for n in mask.shape[1:])
        if mask is not None and not of_samples and mask.shape[0] != 1:
            raise ValueError(
                f"{name}: a mask of shape {mask.shape} is neither of whole samples nor the same "
                "for all, but a covariance is of two whole samples."
            )
        how: Any = dict(activation=self.epilogue(), dtype=self.dtype)
        if batch_size == 0:
            return passes.apply(x, Normalizer(), **how), state
        where = (0,), size
        seen = matrices.covariances(x, where, mask=None if of_samples else mask)
        eye = identities(batch_size, size, seen.cov.dtype)
        if mask is not None and of_samples:
            present = jnp.broadcast_to(mask, (batch_size, *mask.shape[1:]))
            present = groups.split(present, 0, batch_size // size)
            eye *= jnp.squeeze(present, tuple(range(3, present.ndim))).astype(eye.dtype)
        by = DecorrelatedBatchNorm() if self.steps is None else IterativeNorm(steps=self.steps)
        matrix = by.root(seen.cov + self.epsilon * eye, eye)
        return matrices.mix(x, seen.mean, matrix, None, where, **how), state
