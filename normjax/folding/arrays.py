"""Kernel and bias of a layer with a norm folded in, as functions of arrays."""

import math

import jax
import jax.numpy as jnp

from normjax.core import checks, matrices, passes
from normjax.core.compat import is_traced
from normjax.core.method import Linear, Normalizer
from normjax.core.structs import Axes


def into_previous(
    kernel: jax.Array,
    bias: jax.Array | None,
    normalizer: Normalizer | Linear,
    *,
    axes: Axes = -1,
    groups: int = 1,
) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias of a layer and the norm behind it.

    Exact for every dense layer and convolution, with strides, dilations and padding too. Computed
    in at least float32 and rounded once, to the dtypes of kernel and bias (without bias: that of
    the kernel). Without bias, and where the norm has none and no mean, the bias stays None.

    Args:
      kernel: of a dense layer [..., features], of a convolution [..., inputs, features].
      bias: of the shape of the `axes` of the kernel; None: zero.
      normalizer: what `method.evaluation(params, state)` returns; its arrays broadcast to the shape
        of the `axes`.
      axes: those of the kernel that are the features of the output, in their order: -1, or -2 for
        the transposed kernel of a transposed convolution, or several.
      groups: groups of features of a convolution: blocks of a matrix must lie within one.

    Raises:
      ValueError: for shapes that do not fit, and blocks of a matrix across groups.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, normjax.folding as folding
      >>> method = nj.BatchNorm(epsilon=0.0)
      >>> params, state = method.init(None, 2)
      >>> state = state._replace(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 0.25]))
      >>> normalizer = method.evaluation(params, state)
      >>> kernel, bias = folding.into_previous(jnp.ones((3, 2)), None, normalizer)
      >>> kernel[0].tolist(), bias.tolist()
      ([0.5, 2.0], [-0.5, -4.0])
    """
    name, at = "into_previous", checks.as_axes("into_previous", "axes", axes, kernel.shape)
    sizes = tuple(kernel.shape[i] for i in at)
    k, b = _wide(name, kernel, bias, sizes)
    if isinstance(normalizer, Linear):
        of = _blocks(name, normalizer, sizes, groups)
        k = matrices.times(k, of.matrix.mT, (at, of.matrix.shape[-1]))
        b = _mix(of, b)
    else:
        mean, slope, shift = _affine(name, normalizer, sizes, k.dtype)
        k = k * passes.lift(slope, at, k.ndim)
        b = (b - mean) * slope + shift
    return _narrow(kernel, bias, normalizer, k, b)


def into_next(
    kernel: jax.Array,
    bias: jax.Array | None,
    normalizer: Normalizer | Linear,
    *,
    inputs: Axes = -2,
    outputs: Axes = -1,
    groups: int = 1,
    padded: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias of a layer and the norm in front of it.

    A shift does not pass through a convolution that is `padded` with zeros: behind the norm they
    stay zero, but a bias stands for a shift of all positions under the kernel, theirs too. Dtypes
    are those of `into_previous`.

    Args:
      kernel: of a dense layer [inputs, features], of a convolution [..., inputs, features].
      bias: of the shape of the axes `outputs` of the kernel; None: zero.
      normalizer: as for `into_previous`, but of the shape of all inputs, those of all groups.
      inputs, outputs: the axes of the kernel that are features of input and output; all but the
        outputs are summed over.
      groups: groups of features of a convolution.
      padded: whether the layer pads with zeros, or puts zeros between positions.

    Raises:
      ValueError: as `into_previous`, for a shift that is traced or not zero if `padded`, and for
        groups with other axes than the last two.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, normjax.folding as folding
      >>> normalizer = nj.Normalizer(scale=jnp.array([2.0, 3.0]), bias=jnp.array([1.0, -1.0]))
      >>> kernel, bias = folding.into_next(jnp.array([[1.0], [5.0]]), None, normalizer)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0], [15.0]], [-4.0])
    """
    name = "into_next"
    at = checks.as_axes(name, "inputs", inputs, kernel.shape)
    out = checks.as_axes(name, "outputs", outputs, kernel.shape)
    sizes = tuple(kernel.shape[i] for i in out)
    k, b = _wide(name, kernel, bias, sizes)
    k = _join_groups(name, k, groups, at, out)
    of_inputs = tuple(k.shape[i] for i in at)
    if isinstance(normalizer, Linear):
        of = _blocks(name, normalizer, of_inputs, groups)
        folded = matrices.times(k, of.matrix, (at, of.matrix.shape[-1]))
        shift = _mix(of, jnp.zeros(of_inputs, k.dtype))
    else:
        mean, slope, shift = _affine(name, normalizer, of_inputs, k.dtype)
        folded, shift = k * passes.lift(slope, at, k.ndim), shift - mean * slope
    if padded and (is_traced(shift) or bool(jnp.any(shift != 0))):
        raise ValueError(
            f"{name}: the layer pads with zeros, which a bias in place of the norm's shift would "
            "shift too. Leave the norm, or take it behind the layer."
        )
    total = k * passes.lift(shift, at, k.ndim)
    folded, total = (_split_groups(a, groups) for a in (folded, total))
    b = b + jnp.sum(total, tuple(i for i in range(k.ndim) if i not in out))
    return _narrow(kernel, bias, normalizer, folded, b)


def _wide(name, kernel, bias, sizes):
    """Kernel and bias in at least float32."""
    if bias is not None and bias.shape != sizes:
        raise ValueError(
            f"{name}: a bias of shape {bias.shape} for a kernel of shape {kernel.shape} with "
            f"features {sizes}."
        )
    dtype = passes.wide(kernel.dtype)
    return kernel.astype(dtype), jnp.zeros(sizes, dtype) if bias is None else bias.astype(dtype)


def _narrow(kernel, bias, normalizer, k, b):
    """Folded kernel and bias in the dtypes of those given; None for a bias that nobody needs."""
    if bias is None and normalizer.mean is None and normalizer.bias is None:
        return k.astype(kernel.dtype), None
    return k.astype(kernel.dtype), b.astype(kernel.dtype if bias is None else bias.dtype)


def _affine(name, normalizer, sizes, dtype):
    """Mean, slope and shift of `(x - mean) * slope + shift`, each of shape `sizes`."""

    def whole(a, default):
        a = jnp.asarray(default if a is None else a, dtype)
        pairs = zip(a.shape, sizes, strict=False)
        if a.ndim not in (0, len(sizes)) or any(n not in (1, m) for n, m in pairs):
            raise ValueError(f"{name}: a normalizer of {a.shape} features for {sizes} of a kernel.")
        return jnp.broadcast_to(a, sizes)

    mean, inverse, scale, bias = map(whole, normalizer, (0, 1, 1, 0))
    return mean, inverse * scale, bias


def _blocks(name, linear, sizes, groups):
    """`linear` with a matrix for each block of the features."""
    features, size = math.prod(sizes), linear.matrix.shape[-1]
    number, fits = -(-features // size), len(linear.matrix)
    if fits not in (1, number) or (linear.bias is not None and linear.bias.shape != sizes):
        given = f"matrices {linear.matrix.shape}"
        raise ValueError(f"{name}: {given} of a normalizer do not fit features {sizes}.")
    if groups > 1 and features // groups % size:
        raise ValueError(
            f"{name}: blocks of {size} features that whitening mixes lie across {groups} groups of "
            f"a convolution with {features} features: take a group_size that divides a group."
        )
    whole = lambda a: jnp.broadcast_to(a, (number, *a.shape[1:]))
    return linear._replace(mean=whole(linear.mean), matrix=whole(linear.matrix))


def _mix(linear, b):
    """The output of `linear` for one position with the features `b`."""
    where = tuple(range(1, b.ndim + 1)), linear.matrix.shape[-1]
    return matrices.mix(b[None], linear.mean, linear.matrix, linear.bias, where)[0]


def _join_groups(name, k, groups, at, out):
    """[..., inputs of a group, outputs] as [..., inputs, outputs of a group]."""
    if groups == 1:
        return k
    *space, inputs, outputs = k.shape
    if (*at, *out) != (k.ndim - 2, k.ndim - 1) or outputs % groups:
        raise ValueError(
            f"{name}: groups={groups} and a kernel of shape {k.shape} with inputs {at} and outputs "
            f"{out}: they are its last two axes, and groups divide the outputs."
        )
    k = jnp.moveaxis(k.reshape(*space, inputs, groups, outputs // groups), -2, -3)
    return k.reshape(*space, groups * inputs, outputs // groups)


def _split_groups(k, groups):
    """The inverse of `_join_groups`."""
    if groups == 1:
        return k
    *space, inputs, outputs = k.shape
    k = jnp.moveaxis(k.reshape(*space, groups, inputs // groups, outputs), -3, -2)
    return k.reshape(*space, inputs // groups, groups * outputs)
