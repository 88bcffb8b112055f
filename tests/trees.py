"""Writes the golden variable trees of both front ends: `python -m tests.trees`."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from flax import traverse_util

import normjax as nj
from normjax import linen, nnx

GOLDEN = pathlib.Path(__file__).parent / "golden"
FEATURES = 32
X = jnp.ones((2, 4, 4, FEATURES))
ARGUMENTS = {
    "Norm": {"method": nj.Ghost(nj.BatchNorm(), groups=2)},
    "Ghost": {"method": nj.BatchNorm(), "groups": 2},
    "GhostBatchNorm": {"ghost_batch_size": 2},
    "EvalNorm": {"ghost_batch_size": 2},
    "GhostNoise": {"ghost_batch_size": 2},
    "AnalyticGhostNoise": {"ghost_batch_size": 2},
    "GhostNoiseBatchNorm": {"ghost_batch_size": 2},
    "ClassAffine": {"num_classes": 3},
    "ConditionalAffine": {"condition_features": 5},
    "Conditioned": {"method": nj.GroupNorm(), "affine": nj.ConditionalAffine(5, form="tadam")},
    "ConditionalBatchNorm": {"num_classes": 3},
    "ConditionalGroupNorm": {"num_classes": 3},
    "AdaptiveLayerNorm": {"condition_features": 5, "form": "adaln_zero"},
    "SandwichBatchNorm": {"num_classes": 3},
    "MultiStats": {"method": nj.BatchNorm(), "num_branches": 2},
    "Chain": {"methods": (nj.LayerNorm(), nj.BatchNorm(running_average="debiased"))},
}
CLASS, VECTOR = {"condition": jnp.ones(2, int)}, {"condition": jnp.ones((2, 5))}
INPUTS = {
    "ClassAffine": CLASS,
    "ConditionalAffine": VECTOR,
    "Conditioned": VECTOR,
    "ConditionalBatchNorm": CLASS,
    "ConditionalGroupNorm": CLASS,
    "AdaptiveLayerNorm": VECTOR,
    "SandwichBatchNorm": CLASS,
    "MultiStats": {"branch": 1},
    "AuxBatchNorm": {"branch": 1},
    "SandwichAuxBatchNorm": {"branch": 1},
    "AdaptiveInstanceNorm": {"style": X},
    "SandwichAdaptiveInstanceNorm": {"style": X},
    "WeightNormalizedAddition": {"others": X},
}


def describe(tree):
    """Paths, shapes and dtypes of a nested dict of arrays."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {path: f"{a.dtype}{list(a.shape)}" for path, a in sorted(flat.items())}


def linen_tree(module, arguments=(True,)):
    """The variable tree that a Linen module makes."""
    given = INPUTS.get(type(module).__name__, {})
    return describe(jax.eval_shape(lambda: module.init(jax.random.key(0), X, *arguments, **given)))


def nnx_tree(module):
    """The variable tree of an NNX module, the kind of each variable in front."""
    flat = flax_nnx.to_flat_state(flax_nnx.state(module))
    named = {
        "/".join([type(v).__name__, *map(str, path)]): v[...]
        for path, v in zip(flat.paths, flat.leaves, strict=True)
    }
    return describe(named)


def trees():
    """The tree of every class of both front ends."""
    made = {"linen": {}, "nnx": {}}
    for name in sorted(set(linen.__all__) - {"Front", "NormalizedKernels"}):
        given = ARGUMENTS.get(name, {})
        made["linen"][name] = linen_tree(getattr(linen, name)(**given))
        rngs = flax_nnx.Rngs(0)
        made["nnx"][name] = nnx_tree(getattr(nnx, name)(num_features=FEATURES, rngs=rngs, **given))
    for method in (nj.WeightNorm(), nj.SpectralWeightNorm()):
        name = f"NormalizedKernels, {type(method).__name__}"
        wrapped = linen.NormalizedKernels(flax_linen.Conv(3, (2, 2)), method)
        made["linen"][name] = linen_tree(wrapped, ())
        plain = flax_nnx.Conv(FEATURES, 3, (2, 2), rngs=flax_nnx.Rngs(0))
        made["nnx"][name] = nnx_tree(nnx.NormalizedKernels(plain, method))
    return made


if __name__ == "__main__":
    for front, tree in trees().items():
        path = GOLDEN / f"{front}.json"
        path.write_text(json.dumps(tree, indent=1) + "\n")
        sys.stdout.write(f"{path.name}\n")
