"""Norms of weights: methods over the kernel of a layer in place of its input.

A row is what makes one feature of the output: the weights of a kernel at one position of its
feature axes. Kernels lie as in Flax, features last: Dense `[in, out]`, Conv `[*window, in, out]`.
ConvTranspose has that layout too, and with `transpose_kernel=True` the features at axis -2; those
of DenseGeneral and Einsum may be several.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core import checks
from normjax.core.checks import field
from normjax.core.compat import kind
from normjax.core.fields import Configuration, Initializer
from normjax.core.method import Traits
from normjax.core.passes import lift, widen
from normjax.core.sharding import place, spec
from normjax.core.structs import AffineParams, Axes, AxisName, Key, several
from normjax.core.tracing import traced_once

START = 15  # steps of the power iteration in `init`


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFields(Configuration):
    """Where the rows of a kernel are, and over which devices they are divided."""

    feature_axes: Axes = field(-1, checks.one_of((), or_else=checks.integers))
    axis_name: AxisName = field(None, checks.optional(checks.axis_name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootFields(Configuration):
    """How a norm is made of a sum of squares: the fields of methods that divide by one.

    `epsilon` is added to the sum ("square"), or to its root ("norm"), as in the public
    implementation of Xiang & Li 2017, https://arxiv.org/abs/1704.03971.
    """

    epsilon: float = field(1e-12, checks.interval(0, open=True))
    epsilon_place: Literal["square", "norm"] = field("square", checks.one_of("square", "norm"))

    def root(self, square: jax.Array) -> jax.Array:
        """The norm, with the epsilon; its derivatives at zero are finite."""
        if self.epsilon_place == "square":
            return jnp.sqrt(square + self.epsilon)
        positive = square > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0) + self.epsilon


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormFields(RootFields, KernelFields):
    """How the norm of a row is made: the fields of `WeightNorm` and `StrictWeightNorm`.

    Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868. `strides` are those of a transposed
    convolution.
    """

    strides: Axes = field(1, checks.positives)


class _Rows(NamedTuple):
    """A kernel, its feature axes, and those along which a row lies."""

    kernel: jax.Array
    at: tuple[int, ...]
    along: tuple[int, ...]

    def sizes(self) -> tuple[int, ...]:
        """Those of the feature axes."""
        return tuple(self.kernel.shape[i] for i in self.at)


def _rows(method, kernel):
    """The kernel as real numbers; ValueError if it has no rows."""
    name = type(method).__name__
    kernel = checks.as_real(name, kernel, "the kernel has")
    at = checks.as_axes(name, "feature_axes", method.feature_axes, kernel.shape)
    along = tuple(i for i in range(kernel.ndim) if i not in at)
    if not along or 0 in kernel.shape:
        raise ValueError(
            f"{name}: a kernel of shape {kernel.shape} has no rows with feature_axes="
            f"{method.feature_axes}: each feature needs weights along another axis. Leave biases "
            "and scales out, or name other axes."
        )
    return _Rows(kernel, at, along)


def _total(method, a, along):
    """Sums of rows, over devices too."""
    total = jnp.sum(a, along, keepdims=True)
    return total if method.axis_name is None else lax.psum(total, method.axis_name)


def _length(method, rows):
    """How many weights a row has."""
    devices = 1 if method.axis_name is None else lax.axis_size(method.axis_name)
    return devices * math.prod(rows.kernel.shape[i] for i in rows.along)


def _mapped(function: Callable[..., Any], kernel: jax.Array, *small: Any) -> jax.Array:
    """`function(kernel, *small)`, computed wide and rounded once.

    Reverse mode keeps the kernel, which is there anyway. The compiler may take from the forward
    pass what it makes again, where both are in one program.
    """

    def run(kernel, *small):
        return function(widen(kernel), *small).astype(kernel.dtype)

    return jax.checkpoint(run, prevent_cse=False)(kernel, *small)


def _strides(method, shape):
    """The stride along each window axis of a kernel."""
    strides, window = method.strides, shape[:-2]
    if isinstance(strides, int):
        return (strides,) * len(window)
    if len(strides) != len(window):
        raise ValueError(
            f"{type(method).__name__}: strides={strides} for a kernel of shape {shape} with window "
            f"{window}: give an integer, or one for each axis of the window."
        )
    return strides


def _norm(method, wide, along):
    """Norms of rows, corrected for strides."""
    square = _total(method, wide * wide, along)
    return method.root(square / math.prod(_strides(method, wide.shape)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNorm(NormFields):
    """Weight normalization: `scale * w / |w|` for every row `w` of a kernel.

    Salimans & Kingma, *Weight Normalization*, 2016, equation 2, https://arxiv.org/abs/1602.07868

    The scale starts at the norm, so that to normalize a kernel, trained or not, changes nothing.
    (Flax's starts at one.) Computed in at least float32; the result has the dtype of the kernel.
    Of a row of zeros all is finite: it gives zeros, and its gradient is that of a plain kernel
    until the scale moves.

    Attributes:
      feature_axes: the axes of features; each has a row of its own. `()`: the kernel is one row.
      epsilon: added to the sum of squares of a row, a number > 0.
      epsilon_place: "norm": added to the norm in place of its square, as in the public
        implementation of Xiang & Li.
      strides: those of a transposed convolution, of which an output sees but a share of the
        weights: the squared norm is divided by their product. An integer for all window axes, or
        one for each.
      axis_name: mapped axes (of `shard_map`, `vmap`) over which rows are divided, in `apply`. Under
        `jit` kernels may lie in any way without it. `init` takes the whole kernel.
      scale_init: initializer of the scale; None: the norm.
      param_dtype: dtype of the scale.

    Raises:
      ValueError: for a field outside its range; for a kernel without rows.
      TypeError: for a kernel that is not of real numbers.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, kernel = nj.WeightNorm(), jnp.array([[3.0, 1.0], [4.0, 0.0]])
      >>> params, state = method.init(None, kernel)
      >>> params.scale.tolist(), method.apply(params, state, 2 * kernel, train=True)[0].tolist()
      ([5.0, 1.0], [[3.0, 1.0], [4.0, 0.0]])
    """

    traits: ClassVar[Traits] = Traits(trains=False, over="kernel")

    scale_init: Initializer | None = field(None, checks.optional(checks.initializer))
    param_dtype: Any = field(jnp.float32, checks.floating)

    def init(self, key: Key, kernel: Any) -> tuple[AffineParams, tuple[()]]:
        """The scale, of the sizes of the feature axes, `param_dtype`; no state."""
        rows = _rows(self, kernel)
        if self.scale_init is not None:
            return AffineParams(self.scale_init(key, rows.sizes(), self.param_dtype)), ()
        alone = dataclasses.replace(self, axis_name=None)
        scale = _norm(alone, widen(rows.kernel), rows.along)
        return AffineParams(scale.reshape(rows.sizes()).astype(self.param_dtype)), ()

    @traced_once
    def apply(
        self, params: AffineParams, state: tuple[()], kernel: jax.Array, *, train: bool
    ) -> tuple[jax.Array, tuple[()]]:
        """The normalized kernel; `train` changes nothing."""
        del train
        rows = _rows(self, kernel)

        def normalize(wide, scale):
            scale = lift(scale.astype(wide.dtype), rows.at, wide.ndim)
            return wide * (scale / _norm(self, wide, rows.along))

        _check_scale(self, params, rows)
        return _mapped(normalize, rows.kernel, params.scale), state


def _check_scale(method, params, rows):
    name, shape = type(method).__name__, rows.kernel.shape
    checks.require_features(name, "feature_axes", rows.at, shape, [params.scale])


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrictWeightNorm(NormFields):
    """Strict weight normalization: `w / |w|` for every row `w` of a kernel, and no scale.

    Xiang & Li, *On the Effects of Batch and Weight Normalization in Generative Adversarial
    Networks*, 2017, https://arxiv.org/abs/1704.03971

    White input of variance one gives output of variance one. Layers are meant to have no bias and
    to be followed by `TPReLU`; the last one has a scale and a bias (`WeightNorm`). The output does
    not change with the size of a row, and the gradient is orthogonal to it: steps of gradient
    descent make rows longer and themselves smaller. `normjax.optim.unit_rows` keeps the rows at
    length one. A row of zeros gives zeros, and a large, finite gradient.

    The public implementation (stormraiser/gan-weightnorm-resnet) adds 1e-8 to the norm:
    `epsilon=1e-8, epsilon_place="norm"`. An earlier one added 1e-6 to its square.

    Attributes:
      feature_axes, epsilon, epsilon_place, strides, axis_name: as in `WeightNorm`.

    Raises:
      ValueError, TypeError: as in `WeightNorm`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method = nj.StrictWeightNorm()
      >>> kernel, _ = method.apply((), (), jnp.array([[3.0, 1.0], [4.0, 0.0]]), train=True)
      >>> print(kernel)
      [[0.6 1. ]
       [0.8 0. ]]
    """

    traits: ClassVar[Traits] = Traits(trains=False, over="kernel")

    def init(self, key: Key, kernel: Any) -> tuple[tuple[()], tuple[()]]:
        """Neither parameters nor state."""
        _rows(self, kernel)
        return (), ()

    @traced_once
    def apply(
        self, params: tuple[()], state: tuple[()], kernel: jax.Array, *, train: bool
    ) -> tuple[jax.Array, tuple[()]]:
        """The normalized kernel; `train` changes nothing."""
        del params, train
        kernel, _, along = _rows(self, kernel)
        return _mapped(lambda wide: wide / _norm(self, wide, along), kernel), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(KernelFields):
    """Weight standardization: every row of a kernel gets mean zero and variance one.

    Qiao et al., *Micro-Batch Training with Batch-Channel Normalization and Weight Standardization*,
    2019, https://arxiv.org/abs/1903.10520

    For layers in front of a group norm, which undoes the size of the output. The variance is that
    of the population, as in timm; a row of equal weights gives zeros.

    Attributes:
      feature_axes, axis_name: as in `WeightNorm`.
      epsilon: added to the variance, a number > 0.

    Raises:
      ValueError, TypeError: as in `WeightNorm`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> kernel = jnp.array([[3.0], [5.0]])
      >>> nj.WeightStandardization(epsilon=1e-9).apply((), (), kernel, train=True)[0].tolist()
      [[-1.0], [1.0]]
    """

    traits: ClassVar[Traits] = Traits(trains=False, over="kernel")

    epsilon: float = field(1e-6, checks.interval(0, open=True))

    def init(self, key: Key, kernel: Any) -> tuple[tuple[()], tuple[()]]:
        """Neither parameters nor state."""
        _rows(self, kernel)
        return (), ()

    @traced_once
    def apply(
        self, params: tuple[()], state: tuple[()], kernel: jax.Array, *, train: bool
    ) -> tuple[jax.Array, tuple[()]]:
        """The standardized kernel; `train` changes nothing."""
        del params, train
        rows = _rows(self, kernel)
        return _mapped(functools.partial(_standardized, self, rows), rows.kernel), state


def _standardized(method, rows, wide):
    """Rows of mean zero and variance one."""
    length = _length(method, rows)
    centred = wide - _total(method, wide, rows.along) / length
    var = _total(method, centred * centred, rows.along) / length
    return centred * lax.rsqrt(var + method.epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledWeightStandardization(KernelFields):
    """Scaled weight standardization: rows of mean zero and norm `gamma`, and a scale for each.

    Brock, De & Smith, *Characterizing signal propagation to close the performance gap in
    unnormalized ResNets*, 2021, https://arxiv.org/abs/2101.08692

    For networks without norms: with `gamma` that of the activation, layers keep the variance of
    their input. The epsilon is added to the variance of a row, as in timm; the authors' code takes
    the larger of the squared norm and 1e-4.

    Attributes:
      feature_axes, axis_name: as in `WeightNorm`.
      epsilon: added to the variance, a number > 0.
      gamma: the gain of the activation in front, a number > 0; 1.7139588594436646 for ReLU.
      use_scale, scale_init, param_dtype: whether a learned scale multiplies each row, its
        initializer and dtype.

    Raises:
      ValueError, TypeError: as in `WeightNorm`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, kernel = nj.ScaledWeightStandardization(gamma=2.0), jnp.array([[0.0], [2.0]])
      >>> y, _ = method.apply(*method.init(None, kernel), kernel, train=True)
      >>> print(f"{jnp.linalg.norm(y):.4f}")
      2.0000
    """

    traits: ClassVar[Traits] = Traits(trains=False, over="kernel")

    epsilon: float = field(1e-6, checks.interval(0, open=True))
    gamma: float = field(1.0, checks.interval(0, math.inf, open=True))
    use_scale: bool = field(True, checks.flag)
    scale_init: Initializer = field(jax.nn.initializers.ones, checks.initializer)
    param_dtype: Any = field(jnp.float32, checks.floating)

    def init(self, key: Key, kernel: Any) -> tuple[AffineParams, tuple[()]]:
        """The scale, of the sizes of the feature axes, `param_dtype`; no state."""
        sizes = _rows(self, kernel).sizes()
        scale = self.scale_init(key, sizes, self.param_dtype) if self.use_scale else None
        return AffineParams(scale), ()

    @traced_once
    def apply(
        self, params: AffineParams, state: tuple[()], kernel: jax.Array, *, train: bool
    ) -> tuple[jax.Array, tuple[()]]:
        """The standardized kernel; `train` changes nothing."""
        del train
        rows = _rows(self, kernel)
        _check_scale(self, params, rows)

        def standardize(wide, scale):
            y = _standardized(self, rows, wide) * (self.gamma / math.sqrt(_length(self, rows)))
            return y if scale is None else y * lift(scale.astype(y.dtype), rows.at, y.ndim)

        return _mapped(standardize, rows.kernel, params.scale), state


class PowerIteration(NamedTuple):
    """What a power iteration has found: a vector of length one over the features.

    Example:
      >>> import jax, normjax as nj
      >>> _, state = nj.SpectralWeightNorm().init(jax.random.key(0), jax.numpy.ones((4, 3)))
      >>> state.vector.shape
      (3,)
    """

    vector: jax.Array  # f32[features]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralWeightNorm(KernelFields):
    """Spectral normalization of weights: a kernel over the largest factor by which it stretches.

    Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, 2018, Algorithm 1,
    https://arxiv.org/abs/1802.05957

    With `operator="matrix"` the factor is that of the kernel as a matrix [rest, features], found by
    a power iteration. Its vector is state. `apply` with `train=True`, and nothing else, moves it,
    and normalizes with the moved one: call it so once in a step, and with `train=False` wherever
    the kernel is used. Gradients take the vector for a constant, which makes those of first order
    exact once it has converged. The paper and PyTorch keep the vector of the other side, or both.

    For a convolution the matrix is not the operator, and its factor may be too small, by up to the
    root of the number of weights of a window. "torus" is the exact factor for periodic maps of
    `map_size` and stride one (Sedghi et al. 2019, https://arxiv.org/abs/1805.10408), by a singular
    value decomposition at every frequency, without state: costly for many channels. "bound" is an
    upper bound for all sizes, strides and paddings: the factor of the matrix, once it has
    converged, times the root of the number of windows that see one position (Tsuzuku et al. 2018,
    https://arxiv.org/abs/1802.04034). Grouped convolutions get no less than the factor of each
    group. For transposed convolutions take `feature_axes=-2`, the inputs, in both.

    Attributes:
      feature_axes, axis_name: as in `WeightNorm`; "torus" needs one axis, and only "matrix" takes
        an `axis_name`.
      epsilon: added to the square of the factor, a number > 0. A kernel of zeros gives zeros, and
        leaves the vector where it is.
      iterations: steps of the power iteration in training, a positive integer; `init` takes 15.
      operator: "matrix", "torus" or "bound", as above.
      map_size: positions along each window axis, for "torus": no fewer than the window has.
      strides: those of the convolution, for "bound": an integer, or one for each window axis.

    Raises:
      ValueError: as in `WeightNorm`; for a `map_size` without "torus", or the reverse; for one
        that does not fit the kernel.
      TypeError: as in `WeightNorm`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method, kernel = nj.SpectralWeightNorm(), jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> params, state = method.init(jax.random.key(0), kernel)
      >>> y, state = method.apply(params, state, kernel, train=True)
      >>> print(f"{y[0, 0]:.4f} {y[1, 1]:.4f}")
      1.0000 0.3333
    """

    traits: ClassVar[Traits] = Traits(over="kernel")

    epsilon: float = field(1e-12, checks.interval(0, open=True))
    iterations: int = field(1, checks.positive)
    operator: Literal["matrix", "torus", "bound"] = field(
        "matrix", checks.one_of("matrix", "torus", "bound")
    )
    map_size: tuple[int, ...] | None = field(None, checks.optional(checks.sizes))
    strides: Axes = field(1, checks.positives)

    def __post_init__(self):
        super().__post_init__()
        wrong, torus = None, self.operator == "torus"
        if torus != (self.map_size is not None):
            wrong = f"map_size={self.map_size}: exactly 'torus' needs the size of the maps."
        elif torus and len(several(self.feature_axes)) != 1:
            wrong = f"with feature_axes={self.feature_axes}, but it needs one axis."
        elif self.operator != "matrix" and self.axis_name is not None:
            wrong = f"with axis_name={self.axis_name!r}, but it takes whole kernels."
        if wrong:
            raise ValueError(f"SpectralWeightNorm: operator={self.operator!r} {wrong}")

    def init(self, key: Key, kernel: Any) -> tuple[tuple[()], Any]:
        """No parameters; a vector f32[features] (for "torus" nothing); `key` (None: 0) draws it."""
        rows = _rows(self, kernel)
        if self.operator == "torus":
            return (), ()
        key = jax.random.key(0) if key is None else key
        start = jax.random.normal(key, rows.sizes(), jnp.float32)
        alone = dataclasses.replace(self, axis_name=None)
        step = lambda _, vector: _power_step(alone, vector, rows)
        return (), PowerIteration(lax.fori_loop(0, START, step, start / jnp.linalg.norm(start)))

    @traced_once
    def apply(
        self, params: tuple[()], state: Any, kernel: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Any]:
        """The normalized kernel, and the state, moved if `train`."""
        del params
        rows = _rows(self, kernel)
        if self.operator == "torus":
            factor, found = _along_wave, _largest_wave(self, rows)
        else:
            vector = lax.stop_gradient(state.vector)
            checks.require_features(
                "SpectralWeightNorm", "feature_axes", rows.at, rows.kernel.shape, [vector]
            )
            for _ in range(self.iterations if train else 0):
                vector = _power_step(self, vector, rows)
            factor, found, state = _along_vector, vector, PowerIteration(vector)

        def normalize(wide, found):
            return wide / jnp.sqrt(factor(self, rows, wide, found) + self.epsilon)

        return _mapped(normalize, rows.kernel, found), state


def _power_step(method, vector, rows):
    """A step of the power iteration; a vector for which there is no next one stays."""
    wide = lax.stop_gradient(widen(rows.kernel))
    side = jnp.sum(
        wide * lift(vector.astype(wide.dtype), rows.at, wide.ndim), rows.at, keepdims=True
    )
    moved = _total(method, wide * side, rows.along).reshape(vector.shape)
    square = jnp.sum(moved * moved)
    found = (square > 0) & (square < jnp.inf)
    moved = moved * lax.rsqrt(jnp.where(found, square, 1))
    return jnp.where(found, moved.astype(vector.dtype), vector)


def _along_vector(method, rows, wide, vector):
    """The square of the factor that the vector finds, times that of a bound."""
    # A product: of a sum with a derivative XLA's CPU compiler would write out the vector, repeated.
    how: dict[str, Any] = {"precision": lax.Precision.HIGHEST}
    parts = spec(wide)
    if any(part is not None for part in parts):
        side_parts = PartitionSpec(*(parts[i] for i in rows.along))
        how["out_sharding"] = NamedSharding(kind(wide).sharding.mesh, side_parts)
        vector = place(vector, tuple(parts[i] for i in rows.at), like=wide)
    axes = (rows.at, tuple(range(vector.ndim)))
    side = jnp.tensordot(wide, vector.astype(wide.dtype), axes, **how)
    square = _total(method, side * side, tuple(range(side.ndim))).reshape(())
    return square * _overlap(method, wide.shape)


def _overlap(method, shape):
    """How many windows see one position; one where the matrix stands for itself."""
    if method.operator != "bound":
        return 1
    strides = _strides(method, shape)
    return math.prod(-(-n // stride) for n, stride in zip(shape[:-2], strides, strict=True))


class _Wave(NamedTuple):
    """What a convolution of periodic maps stretches most: a complex wave in, one out."""

    phase: jax.Array  # [*window]
    inputs: jax.Array
    features: jax.Array


def _largest_wave(method, rows):
    """The wave of the largest singular value at any frequency; no gradient flows through it."""
    wide = lax.stop_gradient(widen(rows.kernel))
    window, size, rank = wide.shape[:-2], method.map_size, wide.ndim
    fits = len(size) == len(window) and all(n >= w for n, w in zip(size, window, strict=True))
    if not fits or rows.at[0] < rank - 2:
        raise ValueError(
            f"SpectralWeightNorm: map_size={size} does not fit a kernel of shape {wide.shape} with "
            f"window {window} and features at axis {rows.at[0]}: give as many sizes, none smaller, "
            "with inputs and features behind the window."
        )
    whole = place(wide, (None,) * rank, like=wide)
    spectrum = jnp.fft.rfftn(whole, s=size, axes=tuple(range(len(size))))
    matrices = spectrum.reshape(-1, *wide.shape[-2:])
    left, values, right = jnp.linalg.svd(matrices, full_matrices=False)
    best = jnp.argmax(values[:, 0])
    turns = jnp.zeros(window, wide.dtype)
    for i, one in enumerate(jnp.unravel_index(best, spectrum.shape[:-2])):
        turn = jnp.arange(window[i]) * one % size[i] / size[i]
        turns = turns + lift(turn.astype(wide.dtype), (i,), len(window))
    phase = lax.complex(jnp.cos(2 * math.pi * turns), -jnp.sin(2 * math.pi * turns))
    before, after = left[best, :, 0].conj(), right[best, 0].conj()
    return _Wave(phase, *((before, after) if rows.at == (rank - 1,) else (after, before)))


def _along_wave(method, rows, wide, wave):
    """The square of the factor of a wave: the factor is linear in the kernel."""
    rank = wide.ndim
    direction = lift(wave.phase, tuple(range(rank - 2)), rank)
    direction = direction * lift(wave.inputs, rows.along[-1:], rank)
    direction = direction * lift(wave.features, rows.at, rank)
    return jnp.square(jnp.sum(wide * direction.real))
