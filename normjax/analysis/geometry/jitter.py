"""How boundaries move from one mini-batch to the next, because its statistics do."""

import functools
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

from normjax import modules
from normjax.analysis.geometry.margins import require_logits, to_others
from normjax.analysis.geometry.networks import Network
from normjax.core import checks
from normjax.core.method import replace
from normjax.core.statistics import Moments, merge
from normjax.core.structs import AffineParams
from normjax.methods.batch import BatchNorm
from normjax.observers import observer


class Jitter(NamedTuple):
    """How the boundaries of one batch norm with C features move over R mini-batches.

    The threshold is the value of the input at which the output is zero, `mean - bias / scale *
    sqrt(var + epsilon)`. Each variance over the batches stands beside its law; see `jitter`.
    Where the scale is zero there is no boundary, and the threshold is not finite.

    Example:
      >>> from normjax.analysis import geometry
      >>> geometry.Jitter._fields[:3]
      ('thresholds', 'threshold_var', 'threshold_law')
    """

    thresholds: jax.Array  # f[R, C], of every batch
    threshold_var: jax.Array  # f[C], their variance
    threshold_law: jax.Array
    mean_var: jax.Array  # f[C], of the mean
    mean_law: jax.Array
    deviation_var: jax.Array  # f[C], of the deviation, sqrt(var + epsilon)
    deviation_law: jax.Array


def jitter(
    model: linen.Module | nnx.Module,
    *args: Any,
    batch_size: int,
    key: jax.Array,
    batches: int = 1024,
    upstream: bool = False,
    **kwargs: Any,
) -> OrderedDict[str, Jitter]:
    """The jitter of the boundaries of every batch norm of a model, measured and by its law.

    Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778,
    say that batch norm moves boundaries at random as dropout does. The law is derived here. Of
    B samples, of an input with deviation s and with r = bias / scale, the variance of the threshold
    is, to first order in 1 / B,

        s^2 / B (1 - r skewness + r^2 (kurtosis - 1) / 4).

    The laws have the second order besides, and B (N - 1) / (N - B) in place of B: the samples are
    drawn without replacement from N. A map has a value for each position; the law takes means over
    the positions of a sample, so that it holds for correlated ones.

    Args:
      model: of Linen or NNX.
      *args, **kwargs: those of `model.apply` in Linen, the variables first, and of the call in
        NNX; the first input are the samples, f[N, ...], of which the mini-batches are drawn.
      batch_size: samples of a mini-batch, from 2 to N.
      key: of the draws.
      batches: how many, at least 2. The relative error of a measured variance is about
        sqrt(2 / batches).
      upstream: False: the norms in front of a norm have the statistics of all samples, so that
        its input does not change, which the law assumes. True: all norms train, as in training. A
        threshold behind another norm then often moves less, for its input is normalized with the
        same batch.

    Returns a `Jitter` by the path of each `BatchNorm`, such as "block/norm".

    Raises:
      TypeError: for what is no Flax module, or no variables in Linen.
      ValueError: for samples that are not real numbers, a number out of its range, and a model
        without a `BatchNorm` that has running statistics.

    Example:
      >>> import jax, flax.linen as nn, normjax.linen
      >>> from normjax.analysis import geometry
      >>> model = nn.Sequential([nn.Dense(3), normjax.linen.BatchNorm(use_running_average=True)])
      >>> x = jax.random.normal(jax.random.key(0), (1000, 5))
      >>> variables = model.init(jax.random.key(1), x)
      >>> found = geometry.jitter(model, variables, x, batch_size=50, key=jax.random.key(2))
      >>> ratio = found["layers_1"].threshold_var / found["layers_1"].threshold_law
      >>> ratio.shape, bool((abs(ratio - 1) < 0.2).all())
      ((3,), True)
    """
    network = Network.of("jitter", model, args, kwargs)
    require_sizes("jitter", network.x, batch_size, batches)
    norms = require_norms("jitter", network)
    how = (batch_size, batches, upstream)
    run = functools.partial(_jitter, network, norms, how)
    return jax.jit(run)(network.variables, network.x, key)


def require_sizes(caller: str, x: jax.Array, batch_size: int, batches: int) -> None:
    """ValueError unless batches of a size can be drawn from samples, and have a variance."""
    for name, value in (("batch_size", batch_size), ("batches", batches)):
        checks.require(caller, name, value, checks.positive)
        if value < 2:
            raise ValueError(f"{caller}: {name}={value}: a variance needs at least 2.")
    if batch_size > len(x):
        raise ValueError(
            f"{caller}: batch_size={batch_size} is more than the {len(x)} samples that there are."
        )


def require_norms(caller: str, network: Network) -> dict[Any, BatchNorm]:
    """The methods of the batch norms of a network by path; ValueError if it has none."""
    given = () if isinstance(network.model, nnx.Module) else (network.variables,)
    every = modules.norms(network.model, *given, *network.args, **network.kwargs)
    whole = dict(axis_name=None, axis_index_groups=None)  # batches are drawn here
    found = {path: replace(m, **whole) for path, m in every.items() if isinstance(m, BatchNorm)}
    if not found:
        raise ValueError(
            f"{caller}: {type(network.model).__name__} has no BatchNorm of normjax: without, its "
            "boundaries do not depend on the batch."
        )
    return found


def _jitter(network, norms, how, variables, x, key):
    batch_size, batches, upstream = how
    order = lambda key: jax.random.permutation(key, len(x))[:batch_size]
    chosen = lax.map(order, jax.random.split(key, batches))
    choose = lambda path, method: norms.get(path)
    evaluating, training = (
        observer(network.model, network.call, train=train, choose=choose) for train in (False, True)
    )
    settled = network.observed(x)
    own = jax.vmap(lambda x: evaluating(settled, x[None]).seen)(x)
    if upstream:
        drawn = lax.map(lambda i: training(variables, x[i]).seen, chosen)
    found = OrderedDict()
    for path, method in norms.items():
        if path not in own:
            continue
        each = own[path]
        if upstream:
            seen = drawn[path]
        else:
            seen = lax.map(lambda i, m=each: merge(Moments(*(a[i] for a in m))), chosen)
        params = _affine(network, variables, path)
        share = (len(x) - batch_size) / (len(x) - 1) / batch_size
        found["/".join(map(str, path))] = _of_norm(method, params, each, seen, share)
    return found


def _affine(network, variables, path):
    """Scale and bias of a norm; None for what it lacks."""
    if isinstance(network.model, nnx.Module):
        model = nnx.merge(nnx.split(network.model)[0], variables, copy=True)
        own: Any = dict(nnx.iter_modules(model))[path]
        return own.unpack()[0]
    own = functools.reduce(lambda tree, name: tree.get(name, {}), path, variables.get("params", {}))
    own = linen.meta.unbox(own)
    return AffineParams(own.get("scale"), own.get("bias"))


def _threshold(normalizer):
    """The input at which a normalizer returns zero."""
    if normalizer.bias is None:
        return normalizer.mean
    inverse, scale = normalizer.inverse, normalizer.scale
    unit = jnp.ones_like(normalizer.bias) if scale is None else scale
    lift = lambda a: jnp.broadcast_to(a, inverse.shape)
    return normalizer.mean - lift(normalizer.bias) / (inverse * lift(unit))


def _of_norm(method, params, each, seen, share):
    """`Jitter` from the moments of every sample [N, C] and of every batch [R, C]."""
    whole = merge(each)
    normalizer = method.coefficients(params, None, whole)
    thresholds = _threshold(method.coefficients(params, None, seen))
    deviation = lambda moments: jnp.sqrt(moments.var + method.epsilon)
    ratio = (normalizer.mean - _threshold(normalizer)) / deviation(whole)
    gap = each.mean - whole.mean[None]
    square = each.var + jnp.square(gap) - whole.var[None]
    law = functools.partial(_law, share, gap, square, deviation(whole))
    return Jitter(
        thresholds=thresholds,
        threshold_var=jnp.var(thresholds, 0),
        threshold_law=law(1, ratio),
        mean_var=jnp.var(seen.mean, 0),
        mean_law=law(1, 0),
        deviation_var=jnp.var(deviation(seen), 0),
        deviation_law=law(0, 1),
    )


def _law(share, e, d, s, one, ratio):
    """Variance of `one * mean - ratio * sqrt(var + epsilon)` over batches, to the second order.

    The function of the means of e and d over a batch is f = one e - ratio sqrt(s^2 + d - e^2), with
    the derivatives below at zero; a share is 1 / B.
    """
    f_d, f_ee, f_dd = -ratio / (2 * s), ratio / s, ratio / (4 * s**3)
    f_eed, f_ddd = -ratio / (2 * s**3), -3 * ratio / (8 * s**5)
    linear = one * e + f_d[None] * d
    of = lambda *factors: jnp.mean(math.prod(factors), 0)
    ee, ed, dd = of(e, e), of(e, d), of(d, d)
    third = f_ee * of(linear, e, e) + f_dd * of(linear, d, d)
    curved = (f_ee * ee) ** 2 + 2 * f_ee * f_dd * ed**2 + (f_dd * dd) ** 2
    bent = of(linear, e) * 2 * f_eed * ed + of(linear, d) * (f_eed * ee + f_ddd * dd)
    return share * of(linear, linear) + share**2 * (third + curved / 2 + bent)


class Swing(NamedTuple):
    """How the margins of P points change over R mini-batches; see `decision_jitter`.

    Example:
      >>> from normjax.analysis import geometry
      >>> geometry.Swing._fields
      ('margins', 'deviation', 'flips')
    """

    margins: jax.Array  # f[R, P]; negative where the class is another than with all the samples
    deviation: jax.Array  # f[P], over the batches: how far the decision boundary moves
    flips: jax.Array  # f[P], share of the batches with another class


def decision_jitter(
    model: linen.Module | nnx.Module,
    *args: Any,
    points: jax.Array,
    batch_size: int,
    key: jax.Array,
    batches: int = 256,
    **kwargs: Any,
) -> Swing:
    """How the decision boundary moves, seen from some points, when statistics are of mini-batches.

    Every norm has the statistics of one mini-batch after another, as in training, with the same
    weights. The margin of a point is that of `margins`, to first order and with a sign: of the
    class that it has with the statistics of all samples, against the best of the others.

    Args:
      points: where to look, f[P, ...] of the shape of the samples; they enter no statistics.
      model, *args, batch_size, key, batches, **kwargs: those of `jitter`. The output of the model
        are logits.

    Raises:
      TypeError, ValueError: as `jitter`, and ValueError for an output that is not [N, K], and
        points of another shape.

    Example:
      >>> import jax, flax.linen as nn, normjax.linen
      >>> from normjax.analysis import geometry
      >>> norm = normjax.linen.BatchNorm(use_running_average=True)
      >>> model = nn.Sequential([nn.Dense(8), norm, nn.relu, nn.Dense(2)])
      >>> x = jax.random.normal(jax.random.key(0), (500, 2))
      >>> how = dict(points=x[:20], key=jax.random.key(1), batches=64)
      >>> variables = model.init(jax.random.key(2), x)
      >>> swings = [geometry.decision_jitter(model, variables, x, batch_size=b, **how)
      ...           for b in (8, 128)]
      >>> bool(swings[0].deviation.mean() > 2 * swings[1].deviation.mean())
      True
    """
    network = Network.of("decision_jitter", model, args, kwargs)
    require_sizes("decision_jitter", network.x, batch_size, batches)
    require_norms("decision_jitter", network)
    require_logits("decision_jitter", network)
    points = jnp.asarray(points, network.x.dtype)
    if points.shape[1:] != network.x.shape[1:] or not points.size:
        raise ValueError(
            f"decision_jitter: points of shape {points.shape} for samples of shape "
            f"{network.x.shape}: all but the first axis are the same."
        )
    found = jax.jit(functools.partial(_swing, network, batch_size, batches))(points, key)
    return Swing(found, jnp.std(found, 0), jnp.mean(found < 0, 0))


def _swing(network, batch_size, batches, points, key):
    """Margins of the points over batches, [R, P]."""
    x = network.x
    classes = jnp.argmax(network.run(network.observed(x), points), -1)

    def draw(key):
        variables = network.observed(x[jax.random.permutation(key, len(x))[:batch_size]])
        logits = lambda x: network.one(variables, x)
        one = lambda x, own: jnp.min(to_others(logits, x, own)[0])
        return jax.vmap(one)(points, classes)

    return lax.map(draw, jax.random.split(key, batches))


__all__ = ["Jitter", "Swing", "decision_jitter", "jitter"]
