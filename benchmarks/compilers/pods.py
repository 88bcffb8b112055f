"""Operations between the chips of slices of TPUs, in a training step of four layers.

A layer is a convolution, a norm and a ReLU. Its arrays are sharded by `jit` in one of these ways:

- data: the batch is sharded over all chips, parameters are replicated
- fsdp: the same, and parameters are sharded over all chips too
- fsdp, constrained: the same, with a constraint that shards the outputs of layers by the batch
- tensor: four chips share the channels of all arrays, and such fours the batch
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax.linen
from benchmarks.compilers.targets import Compiler, Target, placed

NORMS = ("BatchNorm", "LayerNorm", "GroupNorm")
FEATURES = {"data": None, "fsdp": "batch", "fsdp, constrained": "batch", "tensor": "channels"}
LIBRARIES = {"flax": nn, "normjax": normjax.linen}
TENSOR = 4  # chips that share the channels
CHANNELS = 256


class Layers(nn.Module):
    """Convolutions of 1x1, each with the norm that `norm` makes and a ReLU.

    Attributes:
      norm: makes the norms.
      constraint: sharding of the output of every layer; None: the compiler decides.
      layers: number of layers.
    """

    norm: Callable[..., nn.Module]
    constraint: NamedSharding | None
    layers: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.Conv(CHANNELS, (1, 1), use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.relu(self.norm()(x))
            if self.constraint is not None:
                x = jax.lax.with_sharding_constraint(x, self.constraint)
        return x


def jobs(compiler: Compiler) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What is to be compiled, each with a function that does it."""
    for pod in compiler.target.pods:
        devices = Target(pod).devices()
        for layout in FEATURES:
            for norm in NORMS:
                case = {"slice": pod, "chips": len(devices), "layout": layout, "norm": norm}
                yield case, functools.partial(measure, compiler, pod, devices, layout, norm)


def measure(
    compiler: Compiler, pod: str, devices: list[Any], layout: str, norm: str
) -> dict[str, Any]:
    """The figures of each library's training step."""
    model_axis = TENSOR if layout == "tensor" else 1
    mesh = Mesh(np.array(devices).reshape(-1, model_axis), ("batch", "channels"))
    spread = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    constraint = spread("batch") if layout.endswith("constrained") else None
    found = {}
    for peer, library in LIBRARIES.items():
        how = {"use_running_average": False} if norm == "BatchNorm" else {}
        make = functools.partial(getattr(library, norm), dtype=jnp.bfloat16, **how)
        model = Layers(make, constraint)
        x = jax.ShapeDtypeStruct((4 * len(devices), 14, 14, CHANNELS), jnp.bfloat16)
        key = jax.eval_shape(lambda: jax.random.key(0))
        shapes = jax.eval_shape(model.init, key, x)
        place = lambda a: placed(a, spread(*[None] * (a.ndim - 1), FEATURES[layout]))
        variables = {"batch_stats": {}, **jax.tree.map(place, shapes)}

        def step(variables, x, model=model):
            def loss(params):
                y, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
                return jnp.square(y.astype(jnp.float32)).mean(), new

            gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
            return {"batch_stats": {}, **new, "params": params}

        shardings = jax.tree.map(lambda a: a.sharding, variables)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        lowered = jitted.lower(variables, placed(x, spread("batch")))
        found[peer] = compiler.figures(lowered, f"{pod} {layout} {norm} {peer}")
    return {"programs": found}
