"""Reads the reference vectors in `tests/vectors` (see the README there)."""

import json
import pathlib

import numpy as np

import normjax as nj

FOLDER = pathlib.Path(__file__).parent / "vectors"
INDEX = {
    entry["file"].removesuffix(".npz"): entry
    for entry in json.loads((FOLDER / "index.json").read_text())["files"]
}


def names(prefix):
    """Names of the files whose name is `prefix` and a number, in order."""
    return sorted(name for name in INDEX if name.rstrip("0123456789") == f"{prefix}_")


def load(name):
    """Configuration and arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return INDEX[name]["config"], dict(file)


def method(name):
    """normjax's method for the layer that a file was recorded from."""
    config, arrays = load(name)
    kind, tracked = INDEX[name]["method"], "state_0_mean" in arrays
    common = {
        "epsilon": config.get("eps_used", config.get("eps")),
        "use_scale": "param_scale" in arrays,
        "use_bias": "param_bias" in arrays,
    }
    running = {}
    if tracked and config["momentum"] is None:
        running = {"running_average": "cumulative"}
    elif tracked:
        running = {"momentum": 1 - config["momentum"]}

    match kind:
        case "batch_norm":
            return nj.BatchNorm(**common, **running, unbiased_running_var=True)
        case "instance_norm" if tracked:
            instances = nj.BatchNorm(**common, **running, unbiased_running_var=True)
            return nj.Ghost(method=instances, groups=len(arrays["x_1"]))
        case "instance_norm":
            return nj.InstanceNorm(**common)
        case "ghost_batch_norm":
            groups = len(arrays["x_1"]) // (config["ghost_size"] or len(arrays["x_1"]))
            return nj.Ghost(method=nj.BatchNorm(**common, **running), groups=groups)
        case "group_norm":
            return nj.GroupNorm(**common, num_groups=config["num_groups"])
        case "layer_norm":
            axes = tuple(config["normalized_axes"])
            return nj.LayerNorm(**common, reduction_axes=axes, feature_axes=axes)
        case "rms_norm":
            axes = tuple(config["normalized_axes"])
            del common["use_bias"]
            return nj.RMSNorm(**common, reduction_axes=axes, feature_axes=axes)
        case "channel_affine":
            del common["epsilon"]
            return nj.Affine(**common)
    raise ValueError(f"{name}: no method is known for {kind!r}.")
