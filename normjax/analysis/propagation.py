"""How well statistics are known: from a small batch, from a prediction, and from both.

`capture` finds them, and the true ones, at every Kalman norm of a Flax Linen model; `compare` turns
them into errors, those of the fusion for every gain.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from normjax.analysis.layers import capture_inputs
from normjax.core import statistics
from normjax.core.statistics import Moments
from normjax.linen.carry import carry
from normjax.methods.batch import BatchNorm

__all__ = ["Errors", "Statistics", "capture", "compare", "errors"]


class Statistics(NamedTuple):
    """What `capture` finds of the input of one Kalman norm; C features.

    Example:
      >>> from normjax.analysis import propagation
      >>> propagation.Statistics._fields
      ('truth', 'batches', 'prediction')
    """

    truth: Moments  # [C], over all samples and positions
    batches: Moments  # [batches, C], over small batches
    prediction: Moments | None  # [C], the prior of the norm


class Errors(NamedTuple):
    """Mean squared errors of statistics, over features (and batches).

    Example:
      >>> from normjax.analysis import propagation
      >>> propagation.Errors._fields
      ('mean', 'log_var')
    """

    mean: jax.Array  # of the mean, in units of the true variance
    log_var: jax.Array  # of the logarithm of the variance


def capture(
    model: nn.Module,
    variables: Mapping[str, Any],
    x: jax.Array,
    *,
    batch_size: int = 2,
    given: Moments | None = None,
    **kwargs: Any,
) -> dict[str, Statistics]:
    """Statistics of the input of every Kalman norm of a model, by its path.

    Works under `jax.jit`. The model, made for `normjax.linen.carry`, runs once, over all of `x`;
    samples come first and features last. Let it evaluate, so that its activations do not depend on
    small batches of `batch_size`. `given` are the moments of the features of `x`, if known.
    ValueError if `batch_size` does not divide the samples, or if there is no Kalman norm.

    Example:
      >>> import jax, flax.linen as nn, normjax.analysis.propagation as propagation
      >>> from normjax.linen import KalmanNorm, carry
      >>> net = nn.Sequential([nn.Dense(4), KalmanNorm(use_running_average=True)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> with carry.carry():
      ...     variables = net.init(jax.random.key(1), x)
      >>> propagation.capture(net, variables, x)["layers_1"].batches.mean.shape
      (4, 4)
    """
    if x.shape[0] % batch_size:
        raise ValueError(f"capture: batch_size={batch_size} does not divide {x.shape[0]} samples.")
    with carry([] if given is None else [(x, given)]) as known:
        inputs = capture_inputs(model, variables, x, **kwargs)
    if not known.priors:
        raise ValueError(f"capture: {type(model).__name__} has called no Kalman norm.")
    found = {}
    for name, prior in known.priors.items():
        seen = inputs[name or "__call__"]
        parts = seen.reshape(-1, batch_size, *seen.shape[1:])
        batches: Any = jax.vmap(BatchNorm().observe)(parts)
        found[name] = Statistics(statistics.merge(batches), batches, prior)
    return found


def errors(estimate: Moments, truth: Moments) -> Errors:
    """Errors of estimated statistics [..., C] against the true ones [C].

    Example:
      >>> import jax.numpy as jnp, normjax as nj, normjax.analysis.propagation as propagation
      >>> truth = nj.propagate.prediction(jnp.zeros(3), 4 * jnp.ones(3))
      >>> wrong = nj.propagate.prediction(jnp.ones(3), 4 * jnp.ones(3))
      >>> propagation.errors(wrong, truth).mean.item()
      0.25
    """
    mean, var = (jnp.broadcast_to(a, estimate.mean.shape) for a in truth[1:])
    gap = jnp.log(estimate.var) - jnp.log(var)
    return Errors(jnp.mean(jnp.square(estimate.mean - mean) / var), jnp.mean(jnp.square(gap)))


def compare(found: Statistics, gains: Sequence[float] = ()) -> dict[str, Errors]:
    """Errors "batch" of small batches, "prediction", and, arrays [gains], "fusion" of both.

    The fusion is what `KalmanNorm` normalizes a small batch with, whose weight is the gain, in
    [0, 1]. ValueError without a prediction.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, normjax.analysis.propagation as propagation
      >>> one = nj.propagate.prediction(jnp.zeros(3), jnp.ones(3))
      >>> two = nj.propagate.prediction(jnp.zeros((5, 3)), jnp.ones((5, 3)))
      >>> table = propagation.compare(propagation.Statistics(one, two, one), [0.0, 0.5])
      >>> sorted(table), table["fusion"].mean.shape
      (['batch', 'fusion', 'prediction'], (2,))
    """
    if found.prediction is None:
        raise ValueError("compare: this norm has no prediction: nothing in front of it is known.")
    batches = found.batches
    prior = Moments(*(jnp.broadcast_to(a, batches.mean.shape) for a in found.prediction))
    both = jax.tree.map(lambda *a: jnp.stack(a), prior, batches)

    def fused(gain):
        mixture = both._replace(count=jnp.stack([1 - gain, gain]))
        return errors(statistics.merge(mixture), found.truth)

    return {
        "batch": errors(batches, found.truth),
        "prediction": errors(prior, found.truth),
        "fusion": jax.vmap(fused)(jnp.asarray(gains, batches.mean.dtype)),
    }
