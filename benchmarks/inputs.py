"""Norms with further inputs, and the same written with flax.linen: for `benchmarks.speed`."""

import functools
from collections.abc import Callable
from typing import Any

IMAGES = ((64, 32, 32, 64), (32, 56, 56, 64))
TOKENS = ((64, 197, 384), (32, 128, 768))
HEADS = ((16, 256, 8, 64), (16, 256, 4, 128))
CASES = {
    "ConditionalBatchNorm": IMAGES,
    "SandwichBatchNorm": IMAGES,
    "AuxBatchNorm": IMAGES,
    "AdaptiveLayerNorm": TOKENS,
    "RMSNorm, gated": TOKENS,
    "LayerNorm, heads": HEADS,
    "RMSNorm, heads": HEADS,
    "LayerNorm, residual": TOKENS,
    "RMSNorm, residual": TOKENS,
}


def programs(method: str, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[Any, Callable]]:
    """Variables and `apply(variables, x, key) -> (y, new)`, as of `speed.programs`.

    "plain" is normjax's norm without the input. Inputs that have a gradient are with the variables.
    `new` are statistics, and in front of a norm of a sum, `x` and a residual, also that sum.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import linen as nn

    import normjax as nj

    batch, channels = shape[0], shape[-1]
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 10, batch)
    normal = lambda *sizes: jnp.asarray(0.1 * rng.normal(size=sizes), dtype)
    rows = {"scale": 1 + normal(10, channels), "bias": normal(10, channels)}
    rows = {name: a.astype(jnp.float32) for name, a in rows.items()}
    pair, gate = (normal(batch, channels), normal(batch, channels)), normal(*shape)

    def ours(norm, **inputs):
        def apply(variables, x, key):
            (params, given), state = variables[:2], variables[2]
            return norm.apply(params, state, x, train=True, **inputs, **given)

        return apply

    def made(norm, given=None):
        params, state = norm.init(jax.random.key(0), channels)
        return params, given or {}, state

    def theirs(layer, after, extra):
        stats = isinstance(layer, nn.BatchNorm)
        switch = {"use_running_average": False} if stats else {}
        variables = jax.jit(functools.partial(layer.init, **switch))(jax.random.key(0), x0)

        def apply(variables, x, key):
            variables, extra = variables
            y, new = layer.apply(variables, x, mutable=["batch_stats"], **switch)
            return after(y.astype(x.dtype), extra).astype(x.dtype), new

        return (variables, extra), apply

    x0 = jnp.ones((2, *shape[1:]))
    lift = lambda a: jnp.expand_dims(a, tuple(range(1, len(shape) - 1)))
    by_class = lambda y, rows: y * lift(rows["scale"][labels]) + lift(rows["bias"][labels])
    modulated = lambda y, pair: y * (1 + lift(pair[0])) + lift(pair[1])
    gated = lambda y, gate: y * jax.nn.silu(gate)
    bare: dict[str, Any] = dict(use_scale=False, use_bias=False)
    found: dict[str, Any] = {}
    if method in ("ConditionalBatchNorm", "SandwichBatchNorm", "AuxBatchNorm"):
        sandwich, aux = method == "SandwichBatchNorm", method == "AuxBatchNorm"
        norm: Any = nj.ConditionalBatchNorm(num_classes=10)
        norm = nj.SandwichBatchNorm(10) if sandwich else nj.AuxBatchNorm(2) if aux else norm
        given = {"branch": 1} if aux else {"condition": labels}
        found["normjax"] = made(norm), ours(norm, **given)
        found["plain"] = made(nj.BatchNorm()), ours(nj.BatchNorm())
        layer = nn.BatchNorm(**({} if sandwich or aux else bare))
        found["flax"] = theirs(layer, (lambda y, _: y) if aux else by_class, {} if aux else rows)
    elif method == "AdaptiveLayerNorm":
        norm = nj.AdaptiveLayerNorm()
        found["normjax"] = made(norm, {"condition": pair}), ours(norm)
        found["plain"] = made(nj.LayerNorm()), ours(nj.LayerNorm())
        found["flax"] = theirs(nn.LayerNorm(**bare), modulated, pair)
    elif method == "RMSNorm, gated":
        found["normjax"] = made(nj.RMSNorm(), {"gate": gate}), ours(nj.RMSNorm())
        found["flax"] = theirs(nn.RMSNorm(), gated, gate)
    elif method.endswith("residual"):
        kind = method.partition(",")[0]
        norm, layer = getattr(nj, kind)(), getattr(nn, kind)(dtype=dtype)
        variables = jax.jit(layer.init)(jax.random.key(0), x0)
        summed = lambda run: lambda v, x, key: (run(v[0], x + v[1]), x + v[1])
        residual = normal(*shape)
        bare_norm = lambda v, x: norm.apply(*v, x, train=True)[0]
        found["normjax"] = (norm.init(None, channels), residual), summed(bare_norm)
        found["flax"] = (variables, residual), summed(layer.apply)
    else:
        kind = method.partition(",")[0]
        norm = getattr(nj, kind)()
        found["normjax"] = made(norm), ours(norm)
        found["flax"] = theirs(getattr(nn, kind)(), lambda y, _: y, {})
    return found
