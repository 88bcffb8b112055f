"""Carries predicted moments from Kalman norm to Kalman norm through a Flax Linen model.

Inside `with carry():` the Kalman norms of a model need neither a `prior` nor a look at their pair
of outputs: what their layers return is followed by identity, array for array, through convolutions
and dense layers. An array that anything else made is unknown, and a norm that meets one is a plain
batch norm; `add` and `pointwise` make arrays that stay known. Identity ends where a transformation
begins: a block under `nn.remat`, `nn.scan` or the like opens a `carry()` of its own.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.extend.core import get_opaque_trace_state

from normjax import linen, propagate
from normjax.core import checks
from normjax.core.structs import Moments

__all__ = ["Known", "add", "carry", "pointwise"]

PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "CAUSAL")


class Known:
    """Moments of arrays, known by identity.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> known, x = Known(), jnp.ones((2, 3))
      >>> known.put(x, nj.propagate.prediction(jnp.ones(3), jnp.zeros(3)))
      >>> known.get(x).mean.shape, known.get(x + 1)
      ((3,), None)
    """

    def __init__(self):
        self._entries: dict[int, tuple[Any, Moments]] = {}
        self._traces: list[Any] = []  # in which the modules that are being called were called
        self.priors: dict[str, Moments | None] = {}

    def get(self, x: Any) -> Moments | None:
        """The moments of `x`, or None."""
        entry = self._entries.get(id(x))
        return None if entry is None else entry[1]

    def put(self, x: Any, moments: Moments | None) -> None:
        """Notes the moments of `x`, if any, and keeps `x`, so that its id stays its own."""
        if moments is not None:
            self._entries[id(x)] = (x, moments)


_open: list[Known] = []


@contextlib.contextmanager
def carry(**given: tuple[jax.Array, Moments]) -> Iterator[Known]:
    """While it is open, Linen models predict the statistics of their Kalman norms.

    In it a Kalman norm returns y alone, gets as its prior what the layers before make of the
    posterior of the last one, and without such layers is a plain batch norm. `nn.Conv` and
    `nn.Dense` are followed (not those with a mask, nor a padding that has no moments), and so are
    `add` and `pointwise` of this module. Give norms their activation as a field: a `nn.relu` behind
    a norm makes an unknown array. Initialize, train and evaluate inside: outside, the output of a
    Kalman norm is a pair. A model or a block may open it in its own `__call__`, with or without
    `nn.remat`: there it starts anew. Under `jax.jit` the `with` belongs inside of the traced
    function.

    Args:
      **given: pairs of an array that goes into the model and its moments, under any names.

    Yields:
      What is known; its `priors` has the prior (or None) of every Kalman norm by its path.

    Raises:
      ValueError: for a Kalman norm, or a layer behind one, inside of a transformation (`nn.remat`,
        `nn.scan`, `nn.jit`, ...) that began inside of the model.

    Example:
      >>> import jax, jax.numpy as jnp, normjax.linen
      >>> from flax import linen as nn
      >>> from normjax.linen.carry import carry
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         for i in range(2):
      ...             x = nn.Conv(4, (3, 3), use_bias=False)(x)
      ...             x = normjax.linen.KalmanNorm(activation=nn.relu)(x, not train)
      ...         return x
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> with carry() as known:
      ...     variables = Net().init(jax.random.key(1), x, train=False)
      ...     y, _ = Net().apply(variables, x, train=True, mutable=["batch_stats"])
      >>> known.priors["KalmanNorm_0"], known.priors["KalmanNorm_1"].mean.shape
      (None, (4,))
    """
    known = Known()
    if _open and not _is_cut(_open[-1]):
        known.priors = _open[-1].priors
    for x, moments in given.values():
        known.put(x, moments)
    follow = contextlib.nullcontext() if _open else nn.intercept_methods(_follow)
    _open.append(known)
    try:
        with follow:
            yield known
    finally:
        _open.pop()


def add(x: jax.Array, y: jax.Array, covariance: Any = None) -> jax.Array:
    """`x + y`, known if both are: the sum of independent branches, or see `propagate.add`.

    Example:
      >>> import jax.numpy as jnp
      >>> add(jnp.ones(2), jnp.ones(2)).tolist()
      [2.0, 2.0]
    """
    total = x + y
    for known in _open[-1:]:
        a, b = known.get(x), known.get(y)
        if a is not None and b is not None:
            known.put(total, propagate.add(a, b, covariance))
    return total


def pointwise(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function(x)`, known if `x` is; see `propagate.activation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> pointwise(jax.nn.relu, jnp.array([-1.0, 1.0])).tolist()
      [0.0, 1.0]
    """
    y = function(x)
    for known in _open[-1:]:
        moments = known.get(x)
        known.put(y, None if moments is None else propagate.activation(moments, function))
    return y


def _is_cut(known):
    """Whether a transformation began inside of the outermost module that is being called."""
    traces = known._traces
    return bool(traces) and traces[0] != get_opaque_trace_state(convention="flax")


def _follow(call, args, kwargs, context):
    module, known = context.module, _open[-1]
    x = args[0] if args else None
    if context.method_name != "__call__" or x is None:
        return call(*args, **kwargs)
    method: Any = module._method() if isinstance(module, linen.Norm | linen.KalmanNorm) else None
    kalman = checks.returns_posterior(method)
    layer = type(module) in (nn.Conv, nn.Dense)
    if _is_cut(known) and (kalman or (layer and known._entries)):
        raise ValueError(
            f"carry: {'/'.join(module.path)} runs inside of a transformation (nn.remat, nn.scan, "
            "nn.jit, ...) that began inside of the model. Moments cannot pass its border, so the "
            "result would differ from that without it: open `carry()` in the `__call__` of the "
            "transformed block, or give priors by hand."
        )
    moments = known.get(x)
    known._traces.append(get_opaque_trace_state(convention="flax"))
    try:
        if kalman:
            return _call_kalman(known, call, args, kwargs, module, method)
        y = call(*args, **kwargs)
    finally:
        known._traces.pop()
    if layer and moments is not None:
        known.put(y, _through(module, moments, x.shape))
    return y


def _call_kalman(known, call, args, kwargs, module, method):
    prior = kwargs.pop("prior", known.get(args[0]))
    known.priors["/".join(module.path)] = prior
    y, posterior = call(*args, **kwargs, prior=prior)
    if method.posterior == "fused":  # from before the activation
        posterior = propagate.activation(posterior, method.activation)
    known.put(y, posterior)
    return y


def _through(module, moments, shape):
    """Moments of the output of a layer, or None where they are not known."""
    variables = module.variables["params"]
    kernel, bias = nn.unbox(variables["kernel"]), nn.unbox(variables.get("bias"))
    if type(module) is nn.Dense:
        return propagate.dense(moments, kernel, bias)
    rank = kernel.ndim - 2
    unusual = isinstance(module.padding, str) and module.padding not in PADDINGS
    if module.mask is not None or unusual or len(shape) != rank + 2:
        return None
    one = lambda value: 1 if value is None else value
    return propagate.conv(
        moments,
        kernel,
        bias,
        size=shape[1:-1],
        strides=one(module.strides),
        padding=module.padding,
        input_dilation=one(module.input_dilation),
        kernel_dilation=one(module.kernel_dilation),
        feature_group_count=module.feature_group_count,
    )
