"""Reads the reference vectors in `tests/vectors` (see the README there)."""

import json
import pathlib

import numpy as np
from registry import Registry

FOLDER = pathlib.Path(__file__).parent / "vectors"
INDEX = {
    entry["file"].removesuffix(".npz"): entry
    for entry in json.loads((FOLDER / "index.json").read_text())["files"]
}
# By the kind of layer that files were recorded from: (configuration, arrays, epsilon and use of
# scale and bias, kind of running average) -> normjax's method.
LAYERS = Registry()
CHAINS = Registry()  # of a chain: for each of its methods, what its arrays' names begin with
# Where a state was recorded by other names or in other shapes: (configuration, **arrays) -> fields.
STATES = Registry()


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
    """The arrays whose names begin with `prefix`, by the rest; those of a chain also by method.

    A recorded state has the names and shapes that normjax's has.
    """
    _, arrays = load(name)
    found = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    kind = INDEX[name]["method"]
    if prefix.startswith("state_") and kind in STATES:
        return STATES[kind](INDEX[name]["config"], **found)
    if kind not in CHAINS:
        return found
    return {
        link: {k.removeprefix(part): a for k, a in found.items() if k.startswith(part)}
        for link, part in CHAINS[kind].items()
    }


def method(name):
    """normjax's method for the layer that a file was recorded from."""
    config, arrays = load(name)
    tracked = any(k.startswith("state_0_") for k in arrays)
    parameters = {k.rpartition("_")[2] for k in arrays if k.startswith("param_")}
    common = {
        "epsilon": config.get("eps_used", config.get("eps")),
        "use_scale": "scale" in parameters,
        "use_bias": "bias" in parameters,
    }
    running, kept = {}, config.get("decay", config.get("moving_average_keep"))
    if tracked and kept is not None:
        running = {"momentum": kept}
    elif tracked and config["momentum"] is None:
        running = {"running_average": "cumulative"}
    elif tracked:
        running = {"momentum": 1 - config["momentum"]}
    return LAYERS[INDEX[name]["method"]](config, arrays, common, running)
