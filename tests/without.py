"""Norms in a process where JAX lacks something: `python without.py "code that takes it away"`.

It prints the warnings that the package gives, whether its own primitives are in each program, and
outputs and gradients, as JSON.
"""

import json
import sys
import warnings

import jax
import numpy as np


def methods(nj):
    """Method, shape of its input and of its mask, and whether it runs on two devices."""
    return {
        "BatchNorm": (nj.BatchNorm(), (8, 4, 4, 6), (8, 4, 1, 1), False),
        "BatchNorm, devices": (nj.BatchNorm(axis_name="d"), (8, 4, 6), (8, 1, 1), True),
        "LayerNorm": (nj.LayerNorm(), (8, 4, 6), None, False),
        "ring": (nj.SpectralBatchNorm(statistics="ring", bands=2), (8, 4, 4, 6), None, False),
    }


def point(method, shape, mask):
    """Parameters, state, input, cotangent and mask."""
    rng = np.random.default_rng(0)
    params, state = method.init(None, shape[-1])
    params = jax.tree.map(lambda a: (a + rng.normal(size=a.shape)).astype("float32"), params)
    x, g = rng.normal(size=(2, *shape)).astype("float32")
    return params, state, x, g, None if mask is None else rng.random(mask) < 0.7


def results(nj):
    """Of each method whether it has rules, the output, and gradients of scale, bias and input."""
    found = {}
    for name, (method, shape, mask, devices) in methods(nj).items():
        params, state, x, g, mask = point(method, shape, mask)

        def apply(params, x, mask, method=method, state=state):
            return method.apply(params, state, x, train=True, mask=mask)[0]

        if devices:
            whole, parts = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")
            auto = (jax.sharding.AxisType.Auto,)
            mesh = jax.make_mesh((2,), ("d",), axis_types=auto, devices=jax.devices()[:2])
            apply = jax.shard_map(apply, mesh=mesh, in_specs=(whole, parts, parts), out_specs=parts)

        def both(params, x, g, mask, apply=apply):
            y, pull = jax.vjp(lambda *at: apply(*at, mask), params, x)
            return y, pull(g)

        traced = jax.jit(both).trace(params, x, g, mask)
        leaves = jax.tree.leaves(traced.lower().compile()(params, x, g, mask))
        arrays = [np.asarray(a, "float64").tolist() for a in leaves]
        found[name] = "normjax_" in str(traced.jaxpr), arrays
    return found


if __name__ == "__main__":
    exec(sys.argv[1])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        import normjax

        found = results(normjax)
    json.dump([[str(w.message) for w in told], found], sys.stdout)
