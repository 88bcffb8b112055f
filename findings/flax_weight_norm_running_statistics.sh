#!/usr/bin/env bash
# flax 0.12.12 with jax 0.12.0.1: `WeightNorm` of Linen around a module that holds a `BatchNorm` initializes it, and evaluates it,
# but cannot train it: the running statistics raise ModifyScopeVariableError, "collection batch_stats is immutable", though `apply`
# is told that it is mutable. `SpectralNorm` around the same module, which is its neighbour in the documentation and takes a
# module alike, moves the statistics. Around each dense layer by itself `WeightNorm` runs, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12
cat >"$folder/run.py" <<'PY'
import flax.linen as nn
import jax


class Block(nn.Module):
    inside: bool = False

    @nn.compact
    def __call__(self, x, train):
        dense = nn.Dense(3)
        x = nn.WeightNorm(dense)(x) if self.inside else dense(x)
        return nn.BatchNorm(use_running_average=not train)(x)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.SpectralNorm(Block())(x, train, update_stats=train)


x = jax.random.normal(jax.random.key(0), (8, 4))
models = {
    "WeightNorm around the block": nn.WeightNorm(Block()),
    "SpectralNorm around the block": Spectral(),
    "WeightNorm around the dense layer": Block(inside=True),
}
found = {}
for name, model in models.items():
    variables = model.init(jax.random.key(1), x, False)
    model.apply(variables, x, False)
    try:
        model.apply(variables, x, True, mutable=["batch_stats"])
        found[name] = "trains"
    except Exception as error:
        found[name] = type(error).__name__
    print(f"{name}: {found[name]}")
assert list(found.values()) == ["ModifyScopeVariableError", "trains", "trains"]
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py"
# Seen:
# WeightNorm around the block: ModifyScopeVariableError
# SpectralNorm around the block: trains
# WeightNorm around the dense layer: trains
