"""Checks and times normjax on an accelerator in eight minutes: `python -m benchmarks.device`.

Three parts: the answers of every method against the CPU's in float64; forward and backward passes
as shares of what a copy moves, beside flax.linen, autodiff of the plain formulas, and PyTorch and
tokamax where installed; and time and memory of a training step of ResNet-50. What the time does not
allow is left out and named. Without an accelerator everything runs on the CPU, at reduced size.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

import normjax as nj
from benchmarks import bandwidth, machine, methods, resnet, tables
from benchmarks.budget import Budget
from benchmarks.options import whole
from normjax.core.method import feature_sizes, traits

SHARES = {"check": 2, "bandwidth": 5, "network": 4}  # of the time, by part
DTYPES = ("bfloat16", "float32")
# Full and reduced shapes by kind of input.
SHAPES = {
    "rows": ((128, 1024), (16, 32)),
    "images": ((32, 8, 8, 64), (16, 8, 8, 8)),
    "images, masked": ((32, 8, 8, 64), (16, 8, 8, 8)),
    "channels first": ((32, 64, 8, 8), (16, 8, 8, 8)),
}
# Every public method over activations, with the kinds of its inputs.
CASES = {
    "Affine": ("rows",),
    "DynamicTanh": ("rows",),
    "Derf": ("rows",),
    "TReLU": ("rows",),
    "TPReLU": ("rows",),
    "WeightNormalizedAddition(initial=(3.0, 4.0))": ("rows",),
    "RunningNorm(running_average='cumulative')": ("rows",),  # float64 leaves no rests to compare
    "LayerNorm": ("rows", "images, masked"),
    "LayerNorm(activation=gelu)": ("rows",),
    "LayerNorm(reduction_axes=(1, 2, 3))": ("images",),
    "LayerNorm(num_groups=4, scale_offset=1.0)": ("rows",),
    "RMSNorm": ("rows",),
    "GroupNorm(num_groups=4)": ("images", "images, masked"),
    "GroupNorm(num_groups=4, activation=relu)": ("rows",),
    "InstanceNorm": ("images",),
    "BatchNorm": ("images", "images, masked", "rows"),
    "BatchNorm(axis=1, activation=relu)": ("channels first",),
    "BatchNorm(running_average='debiased', unbiased_running_var=True)": ("images",),
    "BatchRenorm(r_max=1.5, d_max=0.5)": ("images",),
    "ClassAffine(num_classes=3)": ("images",),
    "ConditionalAffine(condition_features=5)": ("images",),
    "Conditioned(method=InstanceNorm(), affine=ClassAffine(num_classes=3))": ("images",),
    "ConditionalBatchNorm(num_classes=3)": ("images", "images, masked"),
    "ConditionalGroupNorm(num_groups=4, num_classes=3)": ("images",),
    "AdaptiveLayerNorm(condition_features=5)": ("images", "rows"),
    "SandwichBatchNorm(num_classes=3)": ("images",),
    "MultiStats(method=BatchNorm(), num_branches=2)": ("images",),
    "AuxBatchNorm": ("images",),
    "SandwichAuxBatchNorm": ("images",),
    "AdaptiveInstanceNorm": ("images",),
    "SandwichAdaptiveInstanceNorm": ("images",),
    "Ghost(BatchNorm(), groups=4)": ("images",),
    "GhostBatchNorm(ghost_batch_size=4)": ("images",),
    "ExclusiveBatchNorm": ("images",),
    "EvalNorm(ghost_batch_size=4)": ("images",),
    "GhostNoise(ghost_batch_size=4)": ("images",),
    "GhostNoise(ghost_batch_size=12)": ("images",),
    "AnalyticGhostNoise(ghost_batch_size=8)": ("images",),
    "GhostNoiseBatchNorm(ghost_batch_size=4)": ("images", "images, masked"),
    "GhostNoiseBatchNorm(ghost_batch_size=4, drawing='partition')": ("images",),
    "KalmanNorm": ("images",),
    "KalmanNorm(gain='computed', gain_per='channel')": ("images",),
    "DecorrelatedBatchNorm(group_size=4)": ("images", "images, masked"),
    "CholeskyBatchNorm(group_size=4)": ("images",),
    "IterativeNorm(group_size=4)": ("images", "images, masked"),
    "IterativeNorm(group_size=4, steps=7, minimax_steps=4, scaling='power')": ("images",),
    "StochasticWhiteningBatchNorm(alpha=0.1)": ("images",),
    "SampleWhitening(group_size=2)": ("images",),
    "SpectralBatchNorm": ("images",),
    "SpectralBatchNorm(spectrum='half')": ("images",),
    "SpectralBatchNorm(statistics='ring', bands=3)": ("images",),
    "SpectralBatchNorm(statistics='frequency', map_size=(8, 8))": ("images",),
    "SpectralBatchNorm(statistics='frequency', map_size=(8, 8), route='fft')": ("images",),
    "chain(BatchNorm(), SpectralBatchNorm())": ("images",),
    "chain(LayerNorm(), Affine(), RMSNorm())": ("rows",),
    "chain(BatchNorm(), GhostNoise(ghost_batch_size=4), Affine())": ("images",),
}
# Of the largest value, beyond one rounding to half precision of what comes back; and as many units
# of half precision more where maps or spectra in between are rounded to it.
TOLERANCE = 2e-5
UNITS = {"chain": 3, "SpectralBatchNorm(statistics=": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, prints their tables and writes `device.json` and `device.txt`.

    Returns:
      0, or 1 if an answer was out of tolerance.
    """
    options = _options(argv)
    budget = Budget(options.seconds)
    # The other processes need memory too, and answers are compared with the CPU's.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")
    results = run(options, budget)
    print("\n" + tables.text(results))
    print(f"Written to {options.output}/device.json and device.txt")
    return int(any(not row.get("within", True) for row in results["rows"]))


def _options(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=methods.OVER_ACTIVATIONS,
        choices=methods.OVER_ACTIVATIONS,
        metavar="METHOD",
        help="for the first two parts (default: all)",
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--seconds", type=_seconds, default=480.0, help="time for everything")
    parser.add_argument("--rounds", type=whole, default=15, help="interleaved repetitions")
    parser.add_argument("--batch", type=whole, default=128, help="images of a training step")
    parser.add_argument("--tiny", action="store_true", help="reduced size, for a try")
    parser.add_argument("--output", type=Path, default=Path("runs/device"))
    return parser.parse_args(argv)


def _seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number >= 0")
    return value


def run(options: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """All parts as one JSON-ready dict, written after every row; each part has a share of the time.

    What a part leaves of its share goes to the next.
    """
    found = jax.default_backend() != "cpu"
    if not found:
        print("No accelerator was found: everything runs on the CPU, at reduced size.")
    tiny = options.tiny or not found
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.device", *sys.argv[1:]]),
        "machine": {**machine.describe(), "accelerator": found, "reduced": tiny},
        "versions": _versions(),
        "seconds": options.seconds,
        "left_out": budget.left_out,
        "rows": [],
    }
    batch = min(options.batch, 4) if tiny else options.batch
    parts = {
        "check": lambda: check(options.methods, options.dtypes, tiny, budget),
        "bandwidth": lambda: bandwidth.rows(
            options.methods, options.dtypes, tiny, options.rounds, budget
        ),
        "network": lambda: resnet.rows(batch, tiny, options.rounds, budget),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    shares, done = [SHARES[part] for part in options.parts], 0
    for part, share in zip(options.parts, shares, strict=True):
        done += share
        budget.deadline = budget.start + options.seconds * done / sum(shares)
        for row in parts[part]():
            results["rows"].append({**row, "at_s": round(budget.elapsed(), 1)})
            _write(results, options.output)
            print(f"{budget.elapsed():5.0f} s  {tables.label(row)}", flush=True)
        _write(results, options.output)
    return results


def _versions():
    """Versions of what takes part; None: not installed."""
    versions: dict[str, str | None] = {"normjax": nj.__version__, "flax": flax.__version__}
    for name in ("jax", "jaxlib", "numpy", "torch", "tokamax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    client = jax.devices()[0].client
    return {**versions, "platform": " ".join(client.platform_version.split())}


def _write(results, folder):
    for name, content in (
        ("device.json", json.dumps(results, indent=1) + "\n"),
        ("device.txt", tables.text(results)),
    ):
        part = folder / f"{name}.part"
        part.write_text(content)
        part.replace(folder / name)


def check(
    names: Sequence[str], dtypes: Sequence[str], tiny: bool, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Rows of `compare` for the `CASES` of the named methods."""
    for case, kinds in CASES.items():
        for kind in kinds if case.partition("(")[0] in names else ():
            if not budget.skip(f"check: {case}, {kind}"):
                yield from compare(case, methods.parse(case), kind, dtypes, tiny)


def compare(
    name: str, method: Any, kind: str, dtypes: Sequence[str], tiny: bool
) -> list[dict[str, Any]]:
    """A row for each dtype: how far a training step on the device is from the CPU's in float64.

    The step has the output, the new state and the gradients of parameters and input, and the CPU
    gets the numbers that the device gets.

    Args:
      name: what to call the method.
      method: the method.
      kind: of its input, a key of `SHAPES`.
      dtypes: names of dtypes.
      tiny: reduced shapes.

    Returns:
      `errors` of the four and their `tolerances`, relative to the largest value and beyond one
      rounding to half precision, None where not finite; which is the `worst`, and whether it is
      `within` its tolerance; or a `note` on what failed.
    """
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    shape = SHAPES[kind][tiny]
    about = {"part": "check", "method": name, "input": kind, "shape": list(shape)}
    try:
        inputs = {dtype: _inputs(method, kind, shape, dtype) for dtype in dtypes}
        narrow = {dtype: jax.device_put(given, device) for dtype, given in inputs.items()}
        lowered = {dtype: jax.jit(_step(method)).lower(given) for dtype, given in narrow.items()}
        with jax.enable_x64(True), jax.default_device(cpu):
            wide = {dtype: jax.device_put(_wide(given), cpu) for dtype, given in inputs.items()}
            exactly = jax.jit(_step(method)).lower(wide[dtypes[0]])
        with ThreadPoolExecutor() as pool:
            fast = {"xla_backend_optimization_level": 0}  # to compile
            reference = pool.submit(exactly.compile, compiler_options=fast)
            started = {dtype: pool.submit(program.compile) for dtype, program in lowered.items()}
    except Exception as error:
        note = bandwidth.complaint(error)
        return [{**about, "dtype": dtype, "within": False, "note": note} for dtype in dtypes]

    def finish(dtype):
        got = started[dtype].result()(narrow[dtype])
        with jax.enable_x64(True), jax.default_device(cpu):
            exact = reference.result()(wide[dtype])
        return _errors(name, dtype, got, exact)

    rows = [{**about, "dtype": dtype, "within": False} for dtype in dtypes]
    return [bandwidth.attempt(row, functools.partial(finish, row["dtype"])) for row in rows]


def _step(method):
    """A training step: output, new state, and gradients, as a function of `_inputs`."""

    def step(given):
        names = "mask", "key", "prior", "condition", "branch", "style", "others"
        more = {name: given[name] for name in names if name in given}

        def output(params, x):
            y, new = method.apply(params, given["state"], x, train=True, **more)
            return jnp.where(given["mask"], y, 0) if "mask" in given else y, new

        y, pullback, new = jax.vjp(output, given["params"], given["x"], has_aux=True)
        params, x = pullback(given["g"])
        return {"output": y, "state": new, "parameters": params, "input": x}

    return step


def _inputs(method, kind, shape, dtype):
    """Parameters and state off their initial values, input and cotangent, and what else it takes.

    NumPy arrays but for the key; all numbers are those of `dtype`, or of float32.
    """
    draw = np.random.default_rng(0)
    features = feature_sizes(method, shape)
    with jax.default_device(jax.devices("cpu")[0]):
        params, state = jax.tree.map(np.asarray, method.init(jax.random.key(0), features))
        noisy = lambda a: (a + 0.3 * draw.standard_normal(a.shape)).astype(a.dtype)
        given = {
            "params": jax.tree.map(noisy, params),
            "state": jax.tree.map(lambda a: (a + 0.25).astype(a.dtype), state),
            "x": (0.5 + draw.standard_normal(shape)).astype(jnp.dtype(dtype)),
            "g": draw.standard_normal(shape).astype(jnp.dtype(dtype)),
        }
        if kind.endswith("masked"):
            given["mask"] = (draw.random(shape[0]) < 0.7).reshape(-1, *(1,) * (len(shape) - 1))
        if traits(method).random:
            given["key"] = jax.random.key(7)
        if "prior" in traits(method).inputs:
            mean, var = draw.standard_normal(features), draw.uniform(0.5, 2, features)
            prior = nj.propagate.prediction(*(jnp.asarray(a, jnp.float32) for a in (mean, var)))
            given["prior"] = jax.tree.map(np.asarray, prior)
        if "condition" in traits(method).inputs:
            of = getattr(method, "affine", method)
            if number := getattr(of, "num_classes", None):
                given["condition"] = np.arange(shape[0], dtype=np.int32) % number
            else:
                vectors = draw.standard_normal((shape[0], of.condition_features))
                given["condition"] = vectors.astype(np.float32)
        if "branch" in traits(method).inputs:
            given["branch"] = np.int32(1)
        for name in traits(method).inputs.keys() & {"style", "others"}:
            given[name] = draw.standard_normal(shape).astype(np.float32)
    return given


def _wide(tree):
    """The same numbers in float64."""
    wide = lambda a: a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
    return jax.tree.map(wide, tree)


def _errors(method, dtype, got, exact):
    """Errors of what `_step` returns, and whether they are within the tolerances."""
    unit = float(jnp.finfo(dtype).eps) if dtype != "float32" else 0.0
    units = sum(n for start, n in UNITS.items() if method.startswith(start))
    errors = {name: _error(got[name], exact[name]) for name in exact}
    # The gradient of the input is a sum in half precision.
    tolerances = {name: TOLERANCE + unit * (units + (name == "input")) for name in exact}
    worst = max(errors, key=lambda name: errors[name] / tolerances[name])
    return {
        "errors": {name: error if math.isfinite(error) else None for name, error in errors.items()},
        "tolerances": tolerances,
        "worst": worst,
        "within": errors[worst] <= tolerances[worst],
    }


def _error(got, exact):
    """The largest error of a tree beyond one rounding, relative to its leaf; inf for NaN."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        once = float(jnp.finfo(a.dtype).eps) / 2 if a.dtype.itemsize < 4 else 0.0
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        beyond = np.maximum(np.abs(a - b) - once * np.abs(b), 0)
        scale = np.max(np.abs(b), initial=0.0) or 1.0
        error = float(np.max(beyond, initial=0.0) / scale)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


if __name__ == "__main__":
    sys.exit(main())
