"""`apply`, written once: observe -> coefficients -> one affine pass; absorb."""

from typing import Any

import jax

from normjax.core import checks, passes, running
from normjax.core.fields import RunningFields
from normjax.core.method import feature_positions
from normjax.core.structs import Key, Mask
from normjax.core.tracing import traced_once


@traced_once
def apply(
    self: Any,
    params: Any,
    state: Any,
    x: jax.Array,
    *,
    train: bool,
    mask: Mask = None,
    weights: Any = None,
    segment_ids: Any = None,
    key: Key = None,
    **inputs: Any,
) -> tuple[jax.Array, Any]:
    """Normalizes real `x` with its own statistics (`train=True`) or with those of evaluation.

    Returns the output, of the shape of `x`, and the state, moved if `train`.

    Args:
      mask: broadcasts to `x`; positions where it is False do not enter the statistics, and nothing
        of them, NaN included, reaches the output at other positions or any gradient.
      weights: how much a position counts in the statistics, and in nothing else: numbers >= 0 that
        broadcast to `x`, of which a mask is the case 0 and 1; constants of the backward pass. All
        times one factor they change no output; the count of the statistics is their sum. Negative
        ones and those that are not finite are a ValueError, and where they are traced count as 0.
      segment_ids: which positions share statistics, where `num_segments` is set: integers in
        [0, num_segments), in any order, that broadcast to `x`. A statistic is that of the positions
        of its axes with one id. Segments may be empty. Positions with the id -1 are masked, and
        their output is `activation(0)`; other ids are a ValueError, and where they are traced are
        as -1.
      key: draws random numbers in training, where the method is random.
      **inputs: further inputs, by the names in the method's traits.
    """
    x, mask = passes.inputs(self, x, mask, weights, segment_ids)
    if not train:
        return evaluate(self, params, state, x, mask, **inputs), state
    at = require_variables(self, params, state, x)
    seen = self.observe(x, mask)
    normalizer = self.coefficients(params, state, seen, key=key, **inputs)
    how: Any = dict(activation=self.epilogue(), dtype=self.dtype, mask=mask)
    y = passes.apply(x, normalizer, at, **how)
    return y, self.absorb(state, seen)


def evaluate(method: Any, params: Any, state: Any, x: Any, mask: Mask, **inputs: Any) -> jax.Array:
    """The output of evaluation, of the shape of `x`; the arguments are those of `apply`."""
    x, mask = passes.inputs(method, x, mask)
    at = require_variables(method, params, state, x)
    normalizer = method.evaluation(params, state, x, mask, **inputs)
    how: Any = dict(activation=method.epilogue(), dtype=method.dtype, mask=mask)
    return passes.apply(x, normalizer, at, **how)


def require_variables(method: Any, params: Any, state: Any, x: Any) -> tuple[int, ...]:
    """The feature axes of `x`; ValueError unless scale, bias, mean and var have their sizes."""
    at, arrays = feature_positions(method, x.shape), (params.scale, params.bias)
    if isinstance(method, RunningFields):
        running.require_state(method, state)
        arrays = (*arrays, state.mean, state.var)
    checks.require_features(type(method).__name__, "axes", at, x.shape, arrays)
    return at
