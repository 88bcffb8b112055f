"""How far samples are from the decision boundary of a classifier."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

from normjax.analysis.geometry.networks import Network
from normjax.core import checks

PER_DISTANCE = 4  # points along the line for each first-order distance
HALVINGS = 30


class Margins(NamedTuple):
    """Distances of N samples from the decision boundary, in the units of the samples.

    Example:
      >>> from normjax.analysis import geometry
      >>> geometry.Margins._fields
      ('first_order', 'along', 'predicted', 'other')
    """

    first_order: jax.Array  # f[N]; negative where the prediction is not the label
    along: jax.Array  # f[N], by bisection in the direction of the gradient; inf where none is met
    predicted: jax.Array  # i32[N]
    other: jax.Array  # i32[N], the class on the other side, to first order


def margins(
    model: linen.Module | nnx.Module,
    *args: Any,
    labels: jax.Array | None = None,
    reach: int = 8,
    **kwargs: Any,
) -> Margins:
    """Distance of samples from the boundary of the class that a model predicts for them.

    To first order that is `min_j (f_p - f_j) / |d(f_p - f_j)/dx|` over the classes j besides the
    predicted p, exact where the model is affine up to there. `along` goes from the sample straight
    against the gradient of that difference, up to `reach` times the first-order distance, and
    returns where another class first comes out: of points a quarter of that distance apart the
    first with another class, and then by bisection. A point of the boundary is there, so it is an
    upper bound of the distance, but for a boundary that is crossed twice between two points.

    Any differentiable model will do; its output are logits [N, K] for K > 1 classes.

    Args:
      model: of Linen or NNX, in evaluation mode.
      *args, **kwargs: those of `model.apply` in Linen, the variables first, and of the call in
        NNX; the first input are the samples, f[N, ...]. A sample is run by itself.
      labels: int[N]: samples that are classified wrongly have negative margins; None: none has.
      reach: how far to look, > 0.

    Raises:
      TypeError: for what is no Flax module, or no variables in Linen, and labels that are no
        integers.
      ValueError: for samples that are not real numbers, an output that is not [N, K], and labels
        of another shape.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn
      >>> from normjax.analysis import geometry
      >>> model, x = nn.Dense(2), jnp.array([[1.0, 0.0], [-2.0, 0.0]])
      >>> dense = {"kernel": jnp.array([[1.0, -1.0], [0.0, 0.0]]), "bias": jnp.zeros(2)}
      >>> found = geometry.margins(model, {"params": dense}, x, labels=jnp.array([0, 0]))
      >>> found.first_order.tolist(), found.along.round(4).tolist()
      ([1.0, -2.0], [1.0, 2.0])
    """
    checks.require("margins", "reach", reach, checks.positive)
    network = Network.of("margins", model, args, kwargs)
    x = network.x
    require_logits("margins", network)
    if labels is not None:
        labels = _labels(labels, x)

    def run(variables, x):
        one = lambda x: _margin(lambda x: network.one(variables, x), reach, x)
        return jax.vmap(one)(x)

    found = jax.jit(run)(network.variables, x)
    if labels is None:
        return found
    sign = jnp.where(found.predicted == labels, 1, -1)
    return found._replace(first_order=sign * found.first_order)


def require_logits(caller: str, network: Network) -> None:
    """ValueError unless the output of a model are logits of at least two classes."""
    x = network.x
    output = jax.eval_shape(network.run, network.variables, x)
    if output.ndim != 2 or output.shape[0] != len(x) or output.shape[1] < 2:
        raise ValueError(
            f"{caller}: the output of the model has shape {output.shape} for {len(x)} samples, but "
            "logits are [N, K] with K > 1 classes."
        )


def to_others(logits: Callable[[jax.Array], jax.Array], x: jax.Array, own: Any) -> tuple[Any, Any]:
    """First-order distances of a sample from where each class equals the class `own`, [K].

    They are negative where the other class is ahead, and inf for the class itself and where the
    difference does not depend on the sample. Also returned are the gradients of the differences,
    [K, size], of length one.
    """
    f, slopes = logits(x), jax.jacrev(logits)(x).reshape(-1, x.size)
    gaps, slopes = f[own] - f, slopes[own][None] - slopes
    lengths = jnp.sqrt(jnp.sum(jnp.square(slopes), 1))
    usable = lengths > 0
    lengths = jnp.where(usable, lengths, 1)
    return jnp.where(usable, gaps / lengths, jnp.inf), slopes / lengths[:, None]


def _labels(labels, x):
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"margins: labels are {labels.dtype}, but integers, one of each sample.")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"margins: labels of shape {labels.shape} for {len(x)} samples, but one of each, [N]."
        )
    return labels


def _margin(logits, reach, x):
    """`Margins` of one sample."""
    predicted = jnp.argmax(logits(x))
    ratios, slopes = to_others(logits, x, predicted)
    other = jnp.argmin(ratios)
    distance, direction = ratios[other], -slopes[other].reshape(x.shape)
    safe = jnp.where(jnp.isfinite(distance), distance, 0)
    inside = lambda t: jnp.argmax(logits(x + t * direction)) == predicted
    t = safe * jnp.arange(PER_DISTANCE * reach + 1) / PER_DISTANCE
    stays = lax.map(inside, t)
    first = jnp.argmin(stays)  # 0 if all are of the class
    low, high = t[jnp.maximum(first - 1, 0)], t[first]

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        is_inside = inside(middle)
        return jnp.where(is_inside, middle, low), jnp.where(is_inside, high, middle)

    low, high = lax.fori_loop(0, HALVINGS, halve, (low, high))
    met = ~jnp.all(stays) | (distance == 0)
    along = jnp.where(met, (low + high) / 2, jnp.inf)
    return Margins(distance, along, predicted, other)


__all__ = ["Margins", "margins"]
