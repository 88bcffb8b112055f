"""Carries predicted moments from Kalman norm to Kalman norm through a Flax Linen model.

Arrays are followed by identity through convolutions, dense layers, `add` and `pointwise`. An array
that anything else made is unknown, and a norm that meets one is a plain batch norm. Identity ends
where a transformation begins: a block under `nn.remat`, `nn.scan` or the like opens its own.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from flax import linen as nn
from flax.core import current_trace

from normjax import propagate
from normjax.core.method import traits
from normjax.core.statistics import Moments
from normjax.linen import Front
from normjax.methods.ghost import Ghost

__all__ = ["Tracker", "add", "carry", "pointwise"]

PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "CAUSAL")


class Tracker:
    """Moments of arrays, known by identity.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> known, x = Tracker(), jnp.ones((2, 3))
      >>> known.put(x, nj.propagate.prediction(jnp.ones(3), jnp.zeros(3)))
      >>> known.get(x).mean.shape, known.get(x + 1)
      ((3,), None)
    """

    def __init__(self, posterior: str = "output"):
        self.posterior = posterior
        self.priors: dict[str, Moments | None] = {}
        self._entries: dict[int, tuple[Any, Moments]] = {}
        self._traces: list[Any] = []  # in which the modules that are being called were called

    def get(self, x: Any) -> Moments | None:
        """The moments of `x`, or None."""
        return self._entries.get(id(x), (x, None))[1]

    def put(self, x: Any, moments: Moments | None) -> None:
        """Notes the moments of `x`, if any, and keeps `x`, so that its id stays its own."""
        if moments is not None:
            self._entries[id(x)] = (x, moments)


_open: contextvars.ContextVar[tuple[Tracker, ...]] = contextvars.ContextVar("open", default=())


@contextlib.contextmanager
def carry(
    inputs: Sequence[tuple[jax.Array, Moments]] = (),
    *,
    posterior: Literal["output", "fused"] = "output",
) -> Iterator[Tracker]:
    """While it is open, Linen models predict the statistics of their Kalman norms.

    A Kalman norm gets as its prior what the layers before it make of the posterior of the last one:
    `nn.Conv` and `nn.Dense` (without a mask, and with a padding that has moments), `add` and
    `pointwise`. Give norms their activation as a field: a `nn.relu` behind a norm makes an unknown
    array. Under `jax.jit` it belongs inside of the traced function. Yields the tracker, whose
    `priors` has the prior (or None) of every Kalman norm by its path. ValueError for a Kalman norm,
    or a layer behind one, in a transformation within the model.

    Args:
      inputs: pairs of an array that goes into the model and its moments.
      posterior: "output": norms hand on the moments of their outputs. "fused": those that
        normalized their inputs, taken through the activation, as the public implementation does.

    Example:
      >>> import jax, normjax.linen
      >>> norm = lambda: normjax.linen.KalmanNorm(use_running_average=False)
      >>> net = nn.Sequential([nn.Dense(4), norm(), nn.Dense(5), norm()])
      >>> with carry() as known:
      ...     variables = net.init(jax.random.key(0), jax.numpy.ones((8, 3)))
      >>> known.priors["layers_3"].mean.shape
      (5,)
    """
    if posterior not in ("output", "fused"):
        raise ValueError(f"carry: posterior={posterior!r} is not one of 'output', 'fused'.")
    known, outer = Tracker(posterior), _open.get()
    if outer and not _is_cut(outer[-1]):
        known.priors = outer[-1].priors
    for x, moments in inputs:
        known.put(x, moments)
    follow = contextlib.nullcontext() if outer else nn.intercept_methods(_follow)
    token = _open.set((*outer, known))
    try:
        with follow:
            yield known
    finally:
        _open.reset(token)


def add(x: jax.Array, y: jax.Array, covariance: Any = None) -> jax.Array:
    """`x + y`, known if both are: the sum of independent branches, or see `propagate.add`.

    Example:
      >>> import jax.numpy as jnp
      >>> add(jnp.ones(2), jnp.ones(2)).tolist()
      [2.0, 2.0]
    """
    return _known(x + y, lambda a, b: propagate.add(a, b, covariance), x, y)


def pointwise(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function(x)`, known if `x` is; see `propagate.activation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> pointwise(jax.nn.relu, jnp.array([-1.0, 1.0])).tolist()
      [0.0, 1.0]
    """
    return _known(function(x), lambda moments: propagate.activation(moments, function), x)


def _known(y, rule, *inputs):
    """`y`, with the moments that `rule` makes of those of `inputs` if all are known."""
    for known in _open.get()[-1:]:
        moments = [known.get(x) for x in inputs]
        known.put(y, None if any(m is None for m in moments) else rule(*moments))
    return y


def _is_cut(known):
    """Whether a transformation began inside of the outermost module that is being called."""
    return any(trace != current_trace() for trace in known._traces[:1])


def _follow(call, args, kwargs, context):
    module, known = context.module, _open.get()[-1]
    if context.method_name != "__call__" or not args:
        return call(*args, **kwargs)
    kalman = isinstance(module, Front) and "prior" in traits(module.method_of()).inputs
    layer = type(module) in (nn.Conv, nn.Dense)
    if _is_cut(known) and (kalman or (layer and known._entries)):
        raise ValueError(
            f"carry: {'/'.join(module.path)} runs inside of a transformation (nn.remat, nn.scan, "
            "nn.jit, ...) that began inside of the model, whose border moments cannot pass: open "
            "`carry()` in the `__call__` of the transformed block, or give priors by hand."
        )
    moments = known.get(args[0])
    known._traces.append(current_trace())
    try:
        if kalman:
            return _call_kalman(known, call, module, *args, **kwargs)
        y = call(*args, **kwargs)
    finally:
        known._traces.pop()
    if layer and moments is not None:
        known.put(y, _through(module, moments, args[0].shape))
    return y


def _call_kalman(known, call, module, x, use_running_average=None, **given):
    """Calls a norm with its prior; notes what it hands on, of its variables before the call."""
    prior = given.pop("prior", known.get(x))
    known.priors["/".join(module.path)] = prior
    variables = None if module.is_initializing() else module.unpack(x)
    y = call(x, use_running_average, **given, prior=prior)
    params, state = variables or module.unpack(x)
    method = module.method_of()
    method = method.method if isinstance(method, Ghost) else method
    if not hasattr(method, "posterior"):
        return y
    if known.posterior == "output":
        posterior = method.posterior(params, state)
    else:
        posterior = propagate.prediction(state.mean, state.var)
        if not (module.is_initializing() or module.evaluates(use_running_average)):
            seen = method.observe(x, given.get("mask"))
            posterior = method.fused(params, state, seen, prior=prior)
        posterior = propagate.activation(posterior, method.activation)
    known.put(y, posterior)
    return y


def _through(module, moments, shape):
    """Moments of the output of a layer, or None where they are not known."""
    variables = module.variables["params"]
    kernel, bias = nn.unbox(variables["kernel"]), nn.unbox(variables.get("bias"))
    if type(module) is nn.Dense:
        return propagate.dense(moments, kernel, bias)
    unusual = isinstance(module.padding, str) and module.padding not in PADDINGS
    if module.mask is not None or unusual or len(shape) != kernel.ndim:
        return None
    steps = ("strides", "input_dilation", "kernel_dilation", "feature_group_count")
    given = {name: getattr(module, name) or 1 for name in steps}
    return propagate.conv(moments, kernel, bias, size=shape[1:-1], padding=module.padding, **given)
