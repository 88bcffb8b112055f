"""How well statistics are known: from a small batch, from a prediction, and from both.

`capture` runs a Flax Linen model with Kalman norms over many images and returns, for every norm,
the true statistics of its input, those of small batches, and the predicted ones; `compare` turns
them into errors, for the fusion over its gain; `plot` shows these.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from normjax import linen
from normjax.core import checks, passes
from normjax.core.structs import Moments
from normjax.linen.carry import carry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Errors", "Statistics", "capture", "compare", "errors", "plot"]


class Statistics(NamedTuple):
    """What `capture` finds of the input of one Kalman norm; C features.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> from normjax.analysis import propagation
      >>> one = nj.propagate.prediction(jnp.zeros(3), jnp.ones(3))
      >>> propagation.Statistics(one, one, None).prediction is None
      True
    """

    truth: Moments  # [C], over all samples and positions
    batches: Moments  # [batches, C], over small batches
    prediction: Moments | None  # [C], the prior of the norm


class Errors(NamedTuple):
    """Mean squared errors of statistics, over features (and batches).

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import propagation
      >>> propagation.Errors(jnp.zeros(()), jnp.ones(())).log_var.item()
      1.0
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

    Works under `jax.jit`. The model runs once, over all of `x`; give it what makes it evaluate, so
    that its activations do not depend on small batches.

    Args:
      model: a Linen module for `normjax.linen.carry`.
      variables: of the model.
      x: its input, the samples first.
      batch_size: samples of a small batch; divides the number of samples.
      given: moments of the features of `x`, if they are known.
      **kwargs: what else the model takes, such as `train=False`.

    Raises:
      ValueError: if `batch_size` does not divide the samples, or if there is no Kalman norm.

    Example:
      >>> import jax, normjax.linen
      >>> from flax import linen as nn
      >>> from normjax.analysis import propagation
      >>> from normjax.linen.carry import carry
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         for i in range(2):
      ...             x = nn.Dense(4)(x)
      ...             x = normjax.linen.KalmanNorm(use_running_average=True, activation=nn.relu)(x)
      ...         return x
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> with carry():
      ...     variables = Net().init(jax.random.key(1), x)
      >>> found = propagation.capture(Net(), variables, x)
      >>> {name: one.batches.mean.shape for name, one in found.items()}
      {'KalmanNorm_0': (4, 4), 'KalmanNorm_1': (4, 4)}
    """
    if x.shape[0] % batch_size:
        raise ValueError(f"capture: batch_size={batch_size} does not divide {x.shape[0]} samples.")
    inputs: dict[str, tuple[Moments, Moments]] = {}

    def look(call, args, kwargs, context):
        module = context.module
        kalman = isinstance(module, linen.Norm | linen.KalmanNorm)
        kalman = kalman and context.method_name == "__call__"
        if kalman and checks.returns_posterior(module._method()):
            z = args[0]
            at = checks.axes("capture", "axis", module._method().axis, z.shape)
            axes = tuple(i for i in range(z.ndim) if i not in at)
            parts = z.reshape(-1, batch_size, *z.shape[1:])
            whole = passes.moments(z, axes)
            small = passes.moments(parts, tuple(i + 1 for i in axes))
            squeeze = lambda m, over: Moments(*(jnp.squeeze(a, over) for a in m))
            name = "/".join(module.path)
            inputs[name] = squeeze(whole, axes), squeeze(small, tuple(i + 1 for i in axes))
        return call(*args, **kwargs)

    known = {} if given is None else {"x": (x, given)}
    with carry(**known) as found, nn.intercept_methods(look):
        model.apply(variables, x, **kwargs)
    if not inputs:
        raise ValueError(f"capture: {type(model).__name__} has called no Kalman norm.")
    return {name: Statistics(*pair, found.priors[name]) for name, pair in inputs.items()}


def errors(estimate: Moments, truth: Moments) -> Errors:
    """Errors of estimated statistics [..., C] against the true ones [C].

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> from normjax.analysis import propagation
      >>> truth = nj.propagate.prediction(jnp.zeros(3), 4 * jnp.ones(3))
      >>> wrong = nj.propagate.prediction(jnp.ones(3), 4 * jnp.ones(3))
      >>> propagation.errors(wrong, truth).mean.item()
      0.25
    """
    mean, var = (jnp.broadcast_to(a, estimate.mean.shape) for a in truth[1:])
    gap = jnp.log(estimate.var) - jnp.log(var)
    return Errors(jnp.mean(jnp.square(estimate.mean - mean) / var), jnp.mean(jnp.square(gap)))


def compare(found: Statistics, gains: Sequence[float] = ()) -> dict[str, Errors]:
    """Errors of small batches, of the prediction, and of their fusion.

    Args:
      found: of one norm, with a prediction.
      gains: weights of the batch, in [0, 1].

    Returns:
      "batch", "prediction" and, as arrays [gains], "fusion": the statistics with which `KalmanNorm`
      normalizes a small batch for each gain.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> from normjax.analysis import propagation
      >>> one = nj.propagate.prediction(jnp.zeros(3), jnp.ones(3))
      >>> two = nj.propagate.prediction(jnp.zeros((5, 3)), jnp.ones((5, 3)))
      >>> table = propagation.compare(propagation.Statistics(one, two, one), [0.0, 0.5])
      >>> sorted(table), table["fusion"].mean.shape
      (['batch', 'fusion', 'prediction'], (2,))
    """
    if found.prediction is None:
        raise ValueError("compare: this norm has no prediction: nothing in front of it is known.")
    batches, prior = found.batches, found.prediction
    mean, var = (jnp.broadcast_to(a, batches.mean.shape) for a in prior[1:])

    def fused(gain):
        gap = mean - batches.mean
        spread = gain * (1 - gain) * jnp.square(gap)
        both = batches.var + (1 - gain) * (var - batches.var) + spread
        return errors(Moments(batches.count, batches.mean + (1 - gain) * gap, both), found.truth)

    return {
        "batch": errors(batches, found.truth),
        "prediction": errors(prior, found.truth),
        "fusion": jax.vmap(fused)(jnp.asarray(gains, batches.mean.dtype)),
    }


def plot(tables: Mapping[str, Mapping[str, Errors]], gains: Sequence[float]) -> "Figure":
    """The errors of the fusion over the gain, a panel for mean and variance, a line for each norm.

    Args:
      tables: what `compare` made of each norm with `gains`.
      gains: the gains.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> from normjax.analysis import propagation
      >>> one = nj.propagate.prediction(jnp.zeros(3), jnp.ones(3))
      >>> two = nj.propagate.prediction(jnp.ones((5, 3)), 2 * jnp.ones((5, 3)))
      >>> table = propagation.compare(propagation.Statistics(one, two, one), [0.0, 0.5, 1.0])
      >>> len(propagation.plot({"norm": table}, [0.0, 0.5, 1.0]).axes)
      2
    """
    from matplotlib.figure import Figure

    figure = Figure((10, 4), dpi=150, layout="constrained")
    titles = ("squared error of the mean / variance", "squared error of the log-variance")
    for field, title, axes in zip(Errors._fields, titles, figure.subplots(1, 2), strict=True):
        for name, table in tables.items():
            values = np.asarray(getattr(table["fusion"], field), np.float64)
            axes.plot(gains, np.maximum(values, 1e-12), label=name)
        axes.set_yscale("log")
        axes.set_xlabel("gain: 0 is the prediction, 1 the small batch")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
