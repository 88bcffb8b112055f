#!/usr/bin/env bash
# flax 0.12.12 with jax 0.12.0.1 (CPU, 8 simulated devices): `Dropout` of Linen raises a ShardingTypeError where the samples of
# its input are sharded over an Explicit axis, which is what `jax.make_mesh` makes by default. The mask is drawn without a
# sharding, and `select` refuses operands that lie differently. NNX's dropout and a dense layer of Linen run in its place, and so
# does the same dropout over an Auto axis.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

key = jax.random.key(0)
linen = nn.Dropout(0.5, deterministic=False)
graph, state = nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
dense = nn.Dense(4)
params = dense.init(key, jnp.ones((1, 4)))
layers = {
    "Linen": lambda x: linen.apply({}, x, rngs={"dropout": key}),
    "NNX": lambda x: nnx.merge(graph, state, copy=True)(x),
    "Dense": lambda x: dense.apply(params, x),
}
found = {}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, PartitionSpec("data")))
        for name, layer in layers.items():
            try:
                jax.jit(layer)(x)
                found[name, kind.name] = "runs"
            except Exception as error:
                found[name, kind.name] = type(error).__name__
            print(name, kind.name, found[name, kind.name])
assert jax.make_mesh((8,), ("data",)).axis_types == (AxisType.Explicit,)
others = {name: seen for name, seen in found.items() if seen != "runs"}
assert others == {("Linen", "Explicit"): "ShardingTypeError"}
PY
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" "$folder/run.py"
# Seen:
# Linen Auto runs
# NNX Auto runs
# Dense Auto runs
# Linen Explicit ShardingTypeError
# NNX Explicit runs
# Dense Explicit runs
