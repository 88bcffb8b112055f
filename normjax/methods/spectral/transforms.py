"""Orthonormal transforms of real maps, as products with matrices or by `jnp.fft`.

A map has `positions = n_1 * ... * n_d` values over its spatial axes. Of its spectrum the half plane
of `jnp.fft.rfftn` is stored: the last spatial axis, of size W, keeps the L = W // 2 + 1 frequencies
0 .. W // 2. With A the transform to that half, and D = `stored_weights`:

    forward   s = A x       ds = A dx       transpose A'
    inverse   x = A' D s    dx = A' D ds    transpose D A
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core.cpu import written
from normjax.core.linear import linear_map
from normjax.core.passes import wide
from normjax.core.sharding import place, spec

FftNorm = Literal["ortho", "backward", "forward", "full"]
Route = Literal["fft", "matmul"]


class Layout(NamedTuple):
    """Which axes of an input are what, each in increasing order."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    spatial: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return tuple(self.shape[i] for i in self.spatial)

    @property
    def samples(self) -> tuple[int, ...]:
        """The axes that are not features."""
        return self.batch + self.spatial

    @property
    def stored(self) -> tuple[int, ...]:
        """Sizes of the stored half plane."""
        return (*self.sizes[:-1], self.sizes[-1] // 2 + 1)


def factors(fft_norm: FftNorm, positions: int) -> tuple[float, float]:
    """What makes of the orthonormal spectrum that of `fft_norm`, and back ("full": no inverses)."""
    root = math.sqrt(positions)
    return {
        "ortho": (1.0, 1.0),
        "backward": (root, 1 / root),
        "forward": (1 / root, root),
        "full": (1 / root, 1 / root),
    }[fft_norm]


def stored_weights(width: int) -> np.ndarray:
    """For each stored frequency of the last axis, how many of the full plane it stands for."""
    weights = np.full(width // 2 + 1, 2.0)
    weights[0] = 1
    if width % 2 == 0:
        weights[-1] = 1
    return weights


def forward(x: jax.Array, layout: Layout, route: Route) -> jax.Array:
    """The stored half of the orthonormal spectrum of each map, in at least float32.

    It is [L, 2, *other spatial, *batch, *features], with real and imaginary part along axis 1.
    """
    once, given, wider = np.ones(layout.stored[-1]), x.dtype, wide(x.dtype)
    return linear_map(
        lambda x: _analyse(x, layout, route, once, wider),
        lambda s: _synthesize(s, layout, route, once, given),
        x,
    )


def inverse(spectrum: jax.Array, layout: Layout, route: Route, dtype: Any) -> jax.Array:
    """The maps, of `dtype`, whose stored half spectra `forward` gives.

    The frequencies of the last axis that are their own mirror images count with the real part that
    they have after the inverse over the other axes, as in `jnp.fft.irfftn`.
    """
    images, given = stored_weights(layout.sizes[-1]), spectrum.dtype
    return linear_map(
        lambda s: _synthesize(s, layout, route, images, dtype),
        lambda x: _analyse(x, layout, route, images, given),
        spectrum,
    )


def _analyse(x, layout, route, weights, dtype):
    """The half spectrum, each frequency times its weight. Transposed by `_synthesize`."""
    if route == "matmul":
        return _products(jnp.transpose(x, order(layout)).astype(dtype), weights, layout)
    whole = tuple(None if i in layout.spatial else part for i, part in enumerate(spec(x)))
    x = jnp.transpose(place(x, whole, like=x), _minor(layout)).astype(dtype)
    s = jnp.fft.rfftn(x, layout.sizes, axes=range(-len(layout.sizes), 0))
    weights = (weights / math.sqrt(math.prod(layout.sizes))).astype(dtype)
    s = jnp.stack([s.real, s.imag]) * weights.reshape((1,) * x.ndim + (-1,))
    return jnp.transpose(s, _major(layout))


def _synthesize(spectrum, layout, route, weights, dtype):
    """The map of a half spectrum, each frequency times its weight, alone: no mirror images."""
    if route == "matmul":
        x = _products_transposed(spectrum, weights, layout)
        return written(jnp.transpose(x, _back(order(layout))), dtype)
    s = jnp.transpose(spectrum, _back(_major(layout)))
    weights = weights / stored_weights(layout.sizes[-1])  # irfft adds the mirror images
    weights = (weights * math.sqrt(math.prod(layout.sizes))).astype(s.dtype)
    s = s * weights.reshape((1,) * len(layout.shape) + (-1,))
    s = lax.complex(s[0], s[1])
    # The inverse over the other axes comes first: a transform over several axes at once need not
    # ignore imaginary parts alike on every backend.
    for axis in range(-len(layout.sizes), -1):
        s = jnp.fft.ifft(s, axis=axis)
    x = jnp.fft.irfft(s, layout.sizes[-1]).astype(dtype)
    return jnp.transpose(x, _back(_minor(layout)))


def order(layout: Layout) -> tuple[int, ...]:
    """The axes of the input as they lie in a spectrum."""
    return (layout.spatial[-1], *layout.spatial[:-1], *layout.batch, *layout.features)


def _minor(layout):
    """The axes of the input as a Fourier transform takes them."""
    return (*layout.batch, *layout.features, *layout.spatial)


def _major(layout):
    """The axes of [2, *batch, *features, *spatial] as they lie in a spectrum."""
    rank, outer = len(layout.shape), len(layout.shape) - len(layout.spatial)
    return (rank, 0, *range(1 + outer, rank), *range(1, 1 + outer))


def _back(order):
    return tuple(np.argsort(order).tolist())


def _angles(frequencies, positions):
    """2 pi k n / N, reduced exactly."""
    product = np.outer(np.arange(frequencies), np.arange(positions)) % positions
    return 2 * np.pi * product / positions


def _half_matrix(width, weights, dtype):
    """Real and imaginary part of the stored frequencies of a real axis: [L, 2, W]."""
    angles = _angles(width // 2 + 1, width)
    matrix = np.stack([np.cos(angles), -np.sin(angles)], 1) / math.sqrt(width)
    return jnp.asarray((matrix * weights[:, None, None]).astype(dtype))


def _whole_matrix(size, dtype):
    """The transform of a complex axis: [part out, frequency, part in, position]."""
    angles = _angles(size, size)
    cos, sin = np.cos(angles), np.sin(angles)
    matrix = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)])
    return (matrix / math.sqrt(size)).astype(dtype)


_dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)


def _along(matrix, spectrum, axis):
    """`matrix` [part out, out, part in, in] times each frequency of axis 0, at `axis`."""
    matrix = jnp.broadcast_to(jnp.asarray(matrix), (len(spectrum), *matrix.shape))
    return jnp.moveaxis(_dot(matrix, spectrum, (((3, 4), (1, axis)), ((0,), (0,)))), 2, axis)


# From this size on, an even axis takes less time as its even and odd positions apart: of their
# products, the first half of the spectrum is the sum and the second half the difference.
SPLIT = 24


def _splits(layout, parts):
    """Whether the first spatial axis is transformed so; `parts` is how it is sharded."""
    size = layout.sizes[0]
    return len(layout.sizes) > 1 and size >= SPLIT and size % 2 == 0 and parts is None


def _split_matrix(size, dtype):
    """Of each parity: [2, part out, first half of the frequencies, part in, positions]."""
    matrix = _whole_matrix(size, dtype)[:, : size // 2]
    return np.moveaxis(matrix.reshape(2, size // 2, 2, size // 2, 2), -1, 0)


def _products(x, weights, layout):
    """Weighted spectrum of [W, *other spatial, ...], every axis in its place."""
    half = _half_matrix(len(x), weights, x.dtype)
    axes = dict(enumerate(layout.sizes[:-1], 2))
    first = functools.partial(_dot, dimension_numbers=(((2,), (0,)), ((), ())))
    if _splits(layout, spec(x)[1]):
        x = x.reshape(len(x), axes[2] // 2, 2, *x.shape[2:])
        spectrum = jax.vmap(first)(jnp.stack([half, half]), jnp.moveaxis(x, 2, 0))
        matrix = _split_matrix(axes.pop(2), x.dtype)
        even, odd = jax.vmap(functools.partial(_along, axis=2))(matrix, spectrum)
        spectrum = jnp.concatenate([even + odd, even - odd], 2)
    else:
        spectrum = first(half, x)
    for axis, size in axes.items():
        spectrum = _along(_whole_matrix(size, x.dtype), spectrum, axis)
    return spectrum


def _products_transposed(spectrum, weights, layout):
    half = _half_matrix(layout.sizes[-1], weights, spectrum.dtype)
    axes = dict(enumerate(layout.sizes[:-1], 2))
    last = functools.partial(_dot, dimension_numbers=(((0, 1), (0, 1)), ((), ())))
    split = _splits(layout, spec(spectrum)[2])
    size = axes.pop(2) if split else 0
    for axis in reversed(axes):
        matrix = _whole_matrix(axes[axis], spectrum.dtype).transpose(2, 3, 0, 1)
        spectrum = _along(matrix, spectrum, axis)
    if not split:
        return last(half, spectrum)
    near, far = jnp.split(spectrum, 2, 2)
    matrix = _split_matrix(size, spectrum.dtype).transpose(0, 3, 4, 1, 2)
    parts = jnp.stack([near + far, near - far])
    parts = jax.vmap(functools.partial(_along, axis=2))(matrix, parts)
    x = jnp.moveaxis(jax.vmap(last)(jnp.stack([half, half]), parts), 0, 2)
    return x.reshape(len(x), size, *x.shape[3:])
