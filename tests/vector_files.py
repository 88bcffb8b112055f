"""Reads the reference vectors in `tests/vectors` (see the README there)."""

import json
import pathlib

import jax
import numpy as np

import normjax as nj

FOLDER = pathlib.Path(__file__).parent / "vectors"
INDEX = {
    entry["file"].removesuffix(".npz"): entry
    for entry in json.loads((FOLDER / "index.json").read_text())["files"]
}

CHAINS = {  # for each method of a chain, what its arrays' names begin with
    "spatial_spectral_batch_norm": {"BatchNorm_0": "spatial_", "SpectralBatchNorm_1": "spectral_"},
}


def names(prefix):
    """Names of the files whose name is `prefix` and a number (and `_f32`), in order."""
    numbered = {name: name.removesuffix("_f32").rstrip("0123456789") for name in INDEX}
    return sorted(name for name in INDEX if numbered[name] == f"{prefix}_")


def dtype(name):
    """What the recorded code computed in: "float64" or "float32"."""
    return INDEX[name]["dtype"]


def load(name):
    """Configuration and arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return INDEX[name]["config"], dict(file)


def fields(name, prefix):
    """The arrays whose names begin with `prefix`, by the rest; those of a chain also by method."""
    _, arrays = load(name)
    found = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    links = CHAINS.get(INDEX[name]["method"])
    if links is None:
        return found
    return {
        link: {k.removeprefix(part): a for k, a in found.items() if k.startswith(part)}
        for link, part in links.items()
    }


def method(name):
    """normjax's method for the layer that a file was recorded from."""
    config, arrays = load(name)
    kind, tracked = INDEX[name]["method"], any(k.startswith("state_0_") for k in arrays)
    parameters = {k.rpartition("_")[2] for k in arrays if k.startswith("param_")}
    common = {
        "epsilon": config.get("eps_used", config.get("eps")),
        "use_scale": "scale" in parameters,
        "use_bias": "bias" in parameters,
    }
    running = {}
    if tracked and "decay" in config:
        running = {"momentum": config["decay"]}
    elif tracked and config["momentum"] is None:
        running = {"running_average": "cumulative"}
    elif tracked:
        running = {"momentum": 1 - config["momentum"]}

    match kind:
        case "batch_norm":
            return nj.BatchNorm(**common, **running, unbiased_running_var=True)
        case "scale_batch_norm":
            start = config["scale_init"] if config["scale_init"] > 0 else 1.0
            initial = {"scale_init": jax.nn.initializers.constant(start)}
            return nj.BatchNorm(**common, **running, **initial, unbiased_running_var=True)
        case "instance_norm" if tracked:
            instances = nj.BatchNorm(**common, **running, unbiased_running_var=True)
            return nj.Ghost(method=instances, groups=len(arrays["x_1"]))
        case "instance_norm":
            return nj.InstanceNorm(**common)
        case "ghost_batch_norm":
            own = {"constant_statistics": config["stop_stats_grad"]}
            return nj.GhostBatchNorm(config["ghost_size"], **common, **running, **own)
        case "exclusive_batch_norm":
            return nj.ExclusiveBatchNorm(config["group_size"], **common, **running)
        case "eval_norm":
            own = {"own_weight": "1/N^2"}
            return nj.EvalNorm(config["ghost_size"], **common, **running, **own)
        case "ghost_noise_injector_replacement":
            own = {"noise": _noise(config), "epsilon": common["epsilon"]}
            return nj.GhostNoise(config["ghost_size"], **own)
        case "ghost_noise_injector_shuffle":
            own = {"noise": _noise(config), "epsilon": common["epsilon"]}
            drawing = "shuffle" if config["shuffle"] else "consecutive"
            return nj.GhostNoise(config["ghost_size"], drawing=drawing, **own)
        case "noisy_affine_transform":
            unit = "deviation, differentiated" if config["scale_shift_by_std"] else "one"
            noise = _noise(config)
            return nj.AnalyticGhostNoise(config["ghost_size"], shift_unit=unit, noise=noise)
        case "kalman_norm":
            own = {"gain": 1 - config["p_rate"], "groups": config["split"], "guard": 100}
            own |= {"posterior": "fused", "running_group": "first"}
            own["unbiased_running_var"] = not config["has_prior"]
            return nj.KalmanNorm(**common, **running, **own)
        case "group_norm":
            return nj.GroupNorm(**common, num_groups=config["num_groups"])
        case "layer_norm":
            axes = tuple(config["normalized_axes"])
            return nj.LayerNorm(**common, reduction_axes=axes, feature_axes=axes)
        case "rms_norm":
            axes = tuple(config["normalized_axes"])
            del common["use_bias"]
            return nj.RMSNorm(**common, reduction_axes=axes, feature_axes=axes)
        case "spectral_batch_norm" | "spatial_spectral_batch_norm":
            spatial = kind.startswith("spatial")
            make = nj.SpatialSpectralBatchNorm if spatial else nj.SpectralBatchNorm
            own = {"spectrum": "half", "fft_norm": config["fft_norm"]}
            return make(**common, **running, **own, unbiased_running_var=True)
        case "channel_affine":
            del common["epsilon"]
            return nj.Affine(**common)
    raise ValueError(f"{name}: no method is known for {kind!r}.")


def _noise(config):
    if config["scale_noise"] and config["shift_noise"]:
        return "both"
    return "scale" if config["scale_noise"] else "shift"
