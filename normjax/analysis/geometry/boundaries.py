"""How near the boundaries of a network's units are to the data."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

from normjax.analysis.geometry.networks import Network
from normjax.analysis.geometry.switches import switches
from normjax.core import checks
from normjax.core.passes import widen
from normjax.methods.batch import BatchNorm


class Fit(NamedTuple):
    """The planes that `tls_fit` finds, K units; in at least float32.

    `var` is the variance that batch norm divides by, and `var = |w|^2 objective / N`: its deviation
    is the root mean square distance of the inputs from the plane, times the length of w.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import geometry
      >>> z = jnp.array([[0.0, 1.0], [0.0, 3.0]])
      >>> fit = geometry.tls_fit(jnp.array([[0.0], [2.0]]), z)
      >>> fit.bias.tolist(), fit.objective.tolist(), fit.var.tolist()
      ([-4.0], [2.0], [4.0])
    """

    bias: jax.Array  # [K]: minus the mean of batch norm
    objective: jax.Array  # [K], the least sum of squared distances
    var: jax.Array  # [K], of z @ kernel


def tls_objective(kernel: jax.Array, bias: jax.Array, z: jax.Array) -> jax.Array:
    """Sum of squared distances of inputs from the boundary of each unit, f[K].

    Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778:
    batch norm solves a problem of total least squares; see `tls_fit`.

    The boundary of unit k is the hyperplane `z @ kernel[:, k] + bias[k] = 0`. All are in at least
    float32; NaN for a unit whose weights are zero.

    Args:
      kernel: weights f[D, K], as those of a dense layer; of a convolution with the axes of the
        window and the input made one.
      bias: f[K], or anything that broadcasts to it.
      z: inputs of the layer, f[N, ..., D]; of a convolution the patches, such as
        `jax.lax.conv_general_dilated_patches` makes.

    Raises:
      ValueError: for a kernel that is not [D, K], and inputs of another size or none.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import geometry
      >>> z = jnp.array([[0.0, 1.0], [5.0, 3.0]])
      >>> [float(geometry.tls_objective(jnp.array([[0.0], [2.0]]), b, z)[0]) for b in (0, -4, -5)]
      [10.0, 2.0, 2.5]
    """
    kernel, z = _layer("tls_objective", kernel, z)
    bias = jnp.broadcast_to(jnp.asarray(bias, z.dtype), kernel.shape[1:])
    values = jnp.matmul(z, kernel, precision=lax.Precision.HIGHEST) + bias[None]
    return jnp.sum(jnp.square(values), 0) / jnp.sum(jnp.square(kernel), 0)


def tls_fit(kernel: jax.Array, z: jax.Array) -> Fit:
    """The bias for which the boundary of each unit is nearest to the inputs: that of batch norm.

    Of all planes with the normals of `kernel` they have the least `tls_objective`, whose arguments
    these are: they pass through the mean of the inputs, as those of batch norm with a bias of zero.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.analysis import geometry
      >>> z = 3 + jax.random.normal(jax.random.key(0), (100, 4))
      >>> kernel = jax.random.normal(jax.random.key(1), (4, 2))
      >>> fit = geometry.tls_fit(kernel, z)
      >>> shift = geometry.tls_objective(kernel, fit.bias + 0.5, z)
      >>> bool((shift > fit.objective).all())
      True
    """
    kernel, z = _layer("tls_fit", kernel, z)
    values = jnp.matmul(z, kernel, precision=lax.Precision.HIGHEST)
    seen = BatchNorm().observe(values)
    return Fit(-seen.mean, tls_objective(kernel, -seen.mean, z), seen.var)


def _layer(caller, kernel, z):
    """Kernel [D, K] and inputs [N, D] of one dtype."""
    kernel, z = (checks.as_real(caller, jnp.asarray(a)) for a in (kernel, z))
    if kernel.ndim != 2 or z.ndim < 2 or z.shape[-1] != kernel.shape[0] or not z.size:
        raise ValueError(
            f"{caller}: a kernel of shape {kernel.shape} with inputs of shape {z.shape}, but they "
            "are [D, K] and [N, ..., D], and not empty."
        )
    dtype = jnp.result_type(widen(kernel), widen(z))
    return kernel.astype(dtype), z.reshape(-1, z.shape[-1]).astype(dtype)


def distances(
    model: linen.Module | nnx.Module, *args: Any, **kwargs: Any
) -> OrderedDict[str, jax.Array]:
    """Distance of samples from the boundary of every unit of a model, to first order.

    It is `|u| / |du/dx|`, where u is what the activation of the unit takes (for ReLU and the like;
    in general the difference whose sign switches it), and x the sample: exact for the units of the
    first layer, and for others if the network is affine between sample and boundary, which
    `nearest` checks. inf where u does not depend on x.

    Args:
      model: of Linen or NNX, in evaluation mode. Piecewise affine: ReLU, leaky ReLU, `abs`,
        `jnp.maximum`, hard tanh and the like, pooling, and norms with running statistics. Max
        pools are allowed, and the boundaries at which they switch are not among those found.
      *args, **kwargs: those of `model.apply` in Linen, the variables first, and of the call in
        NNX; the first input are the samples, f[N, ...]. A sample is run by itself.

    Returns the distances [N, ...] of the units of each activation, in the units of x, by the name
    of the function and its place in the program: "relu_0", "relu_1". Of a convolution there is a
    unit for each position. Takes as many forward passes as a sample has numbers.

    Raises:
      TypeError: for what is no Flax module, or no variables in Linen.
      ValueError: for samples that are not real numbers, a model without such an activation, and
        one that is not piecewise affine, by the step that is not, such as `tanh`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from normjax.analysis import geometry
      >>> model, x = nn.Sequential([nn.Dense(1), nn.relu]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> dense = {"kernel": jnp.array([[0.0], [2.0]]), "bias": jnp.array([1.0])}
      >>> found = geometry.distances(model, {"params": {"layers_0": dense}}, x)
      >>> {name: d.tolist() for name, d in found.items()}
      {'relu_0': [[1.5], [1.5]]}
    """
    network = Network.of("distances", model, args, kwargs)
    return jax.jit(lambda variables, x: _distances(layers(network, variables, "distances"), x)[1])(
        network.variables, network.x
    )


def crossings(found: Mapping[str, jax.Array], radius: float) -> OrderedDict[str, jax.Array]:
    """How many boundaries of each layer meet the ball of a radius around each sample, i32[N].

    `found` is what `distances` returned. ValueError for a radius that is not a number > 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import geometry
      >>> found = {"relu_0": jnp.array([[0.5, 1.5], [2.0, 3.0]])}
      >>> geometry.crossings(found, 1.5)["relu_0"].tolist()
      [2, 0]
    """
    checks.require("crossings", "radius", radius, checks.interval(0, open=True))
    count = lambda d: jnp.sum(d.reshape(len(d), -1) <= radius, 1)
    return OrderedDict((name, count(d)) for name, d in found.items())


class Nearest(NamedTuple):
    """Of one layer, the unit whose boundary is the nearest to each of N samples, to first order.

    Example:
      >>> from normjax.analysis import geometry
      >>> geometry.Nearest._fields
      ('distance', 'unit', 'exact')
    """

    distance: jax.Array  # f[N]; inf if no unit depends on the sample
    unit: jax.Array  # i32[N], its place among all units of the layer
    exact: jax.Array  # bool[N], whether the boundary is where the first order says


def nearest(
    model: linen.Module | nnx.Module, *args: Any, **kwargs: Any
) -> OrderedDict[str, Nearest]:
    """The nearest boundary of each layer to each sample, and whether its distance is exact.

    The foot point is `x - u g / |g|^2` with the gradient g. `exact` says that no unit of an earlier
    layer has switched there, and that u is zero (max pools may switch), within rounding. The
    distance is then that of a point of the boundary, and of the nearest one in the linear region of
    the sample. Mean `exact` is the share of samples for which the first order is right.

    Arguments, layers and errors are those of `distances`.

    Example:
      >>> import jax, flax.linen as nn
      >>> from normjax.analysis import geometry
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x = jax.random.normal(jax.random.key(0), (100, 2))
      >>> found = geometry.nearest(model, model.init(jax.random.key(1), x), x)
      >>> [bool(of_layer.exact.all()) for of_layer in found.values()]
      [True, False]
    """
    network = Network.of("nearest", model, args, kwargs)
    run = lambda variables, x: _nearest(layers(network, variables, "nearest"), x)
    return jax.jit(run)(network.variables, network.x)


def layers(network: Network, variables: Any, caller: str) -> Callable[[jax.Array], Any]:
    """The function of samples [N, ...] that returns the values u of the units, by layer."""
    one = lambda x: switches(caller, lambda x: network.one(variables, x), x)[1]
    return jax.vmap(one)


def _distances(values, x):
    """u and distances of every unit, [N, ...] by layer."""
    u, push = jax.linearize(values, x)
    size = x[0].size

    def add(squares, i):
        direction = (jnp.arange(size) == i).astype(x.dtype).reshape(x.shape[1:])
        slopes = push(jnp.broadcast_to(direction, x.shape))
        return jax.tree.map(lambda s, slope: s + jnp.square(slope), squares, slopes), None

    squares, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, u), jnp.arange(size))
    return u, jax.tree.map(_ratio, u, squares)


def _ratio(u, squares):
    length = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return jnp.where(squares > 0, jnp.abs(u) / length, jnp.inf)


def _nearest(values, x):
    u, found = _distances(values, x)
    _, pull = jax.vjp(values, x)
    earlier, nearest = [], OrderedDict()
    for name, d in found.items():
        flat = d.reshape(len(d), -1)
        unit = jnp.argmin(flat, 1)
        own = jnp.arange(flat.shape[1])[None] == unit[:, None]
        chosen = {n: jnp.zeros_like(a) for n, a in u.items()}
        chosen[name] = own.reshape(d.shape).astype(d.dtype)
        (g,) = pull(OrderedDict(chosen))
        axes = tuple(range(1, x.ndim))
        gap = jnp.sum(u[name] * chosen[name], tuple(range(1, d.ndim)))
        length = jnp.sum(jnp.square(g), axes)
        step = jnp.where(length > 0, gap / jnp.where(length > 0, length, 1), 0)
        at = values(x - jnp.expand_dims(step, axes) * g)
        same = [_all(jnp.sign(at[n]) == jnp.sign(u[n])) for n in earlier]
        left = jnp.sum(jnp.abs(at[name]) * chosen[name], tuple(range(1, d.ndim)))
        scale = jnp.max(jnp.abs(u[name]).reshape(len(d), -1), 1)
        zero = left <= 1e-3 * jnp.abs(gap) + 100 * jnp.finfo(d.dtype).eps * scale
        exact = jnp.all(jnp.stack([length > 0, zero, *same]), 0)
        nearest[name] = Nearest(jnp.min(flat, 1), unit, exact)
        earlier.append(name)
    return nearest


def _all(a):
    return jnp.all(a.reshape(len(a), -1), 1)


__all__ = ["Fit", "Nearest", "crossings", "distances", "nearest", "tls_fit", "tls_objective"]
