"""How deep residual networks are in effect: `python -m benchmarks.depth`.

Littwin & Wolf 2016, https://arxiv.org/abs/1611.02525. Studies, each with a file of its own; those
named are run, or all.

initialization: gains of networks with random weights on handwritten digits: pre-activation
convolutions, and the paper's dense blocks with one common scale of their batch norms.

training: the paper's experiment, a network of dense blocks that separates 50 Gaussians, with batch
norm, with decay of its scales, and without batch norm; and the same blocks on digits. At some steps
the gains and scales of all blocks are measured, and at the end the energies of all paths.

cost: seconds for the gains of 56 blocks on 1,000 images of 8x8 pixels, and what `layers.calls` adds
to a forward pass of ResNet-50.

Of `training` the distributions of path lengths are also drawn, as PNG.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import normjax as nj
from benchmarks import data, machine, models, report, resnet
from benchmarks.options import Studies, whole
from normjax.analysis import depth, figures, layers
from normjax.linen import BatchNorm

SCALES = (0.1, 0.3, 1.0, 3.0, 8.0)
MOMENTS = (0, 10, 30, 100, 300, 1000)  # steps at which a network in training is measured
ARMS = {
    "gaussians, BN": ("gaussians", True, 0.0),
    "gaussians, BN, decay": ("gaussians", True, 0.01),
    "gaussians, no BN": ("gaussians", False, 0.0),
    "digits, BN": ("digits", True, 0.0),
}
PART = 10  # steps of one program
IMAGES = 256  # of those measured


class Block(nn.Module):
    """The paper's: `x + scale / deviation * relu(W x)`, of batch norm with its mean and bias."""

    scale: float | None = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f32[N, width] of the same."""
        return x + rectified(x, x.shape[-1], self.scale)


class Dense(nn.Module):
    """A layer without a skip, and dense blocks.

    Attributes:
      classes: number of classes.
      blocks: number of blocks.
      width: units of each.
      scale: initial scale of the batch norms of blocks, that of the first is 1; None: there are
        none. With one factor on the first too, all activations have it, and gains stay the same.
    """

    classes: int
    blocks: int = 10
    width: int = 32
    scale: float | None = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits f32[N, classes] of f32[N, ...]."""
        x = rectified(x.reshape(len(x), -1), self.width, None if self.scale is None else 1.0)
        for number in range(self.blocks):
            x = Block(self.scale, name=f"block_{number}")(x)
        return nn.Dense(self.classes, name="head")(x)


def rectified(x: jax.Array, width: int, scale: float | None) -> jax.Array:
    """A dense layer, ReLU and batch norm; without the last, weights begin at a third."""
    gain = 2.0 if scale is not None else 2.0 / 9
    init = nn.initializers.variance_scaling(gain, "fan_in", "normal")
    x = nn.relu(nn.Dense(width, use_bias=False, kernel_init=init, name="dense")(x))
    if scale is None:
        return x
    how = {"scale_init": nn.initializers.constant(scale), "use_running_average": False}
    return BatchNorm(**how, name="norm")(x)


def gaussians(seed: int, classes: int = 50, features: int = 20, samples: int = 4000) -> Any:
    """Samples f32[samples, features] of as many Gaussians, of deviation 1 around Normal(0, 2^2)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    centres = 2 * rng.standard_normal((classes, features))
    x = centres[labels] + rng.standard_normal((samples, features))
    return x.astype("float32"), labels


@functools.cache
def digits() -> Any:
    """The train images f32[N, 8, 8, 1], standardized, and their labels."""
    found = data.load("digits", None)
    x = np.asarray(found.train_images, "float32")
    return (x - x.mean()) / x.std(), np.asarray(found.train_labels)


def lengths(gains: Any) -> dict[str, Any]:
    """The mean length over that of the longest path, by gain and weights."""
    kinds = itertools.product(("forward", "jacobian"), ("amplitude", "energy"))
    found = {kind: depth.network_lengths(gains, by=kind[0], weights=kind[1]) for kind in kinds}
    return {", ".join(kind): float(each.mean / each.length[-1]) for kind, each in found.items()}


def columns(gains: Any) -> dict[str, list[Any]]:
    """The gains of all blocks by field."""
    return dict(zip(depth.Gains._fields, map(list, zip(*gains.values(), strict=True)), strict=True))


def initialization(options: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """A row for each network and seed."""
    kinds = [("convolutions", 1.0), *(("dense", scale) for scale in SCALES)]
    task = progress.add_task("initialization", total=len(kinds) * options.seeds)
    x, rows = digits()[0][: options.images], []
    for (kind, scale), seed in itertools.product(kinds, range(options.seeds)):
        key = jax.random.key(seed)
        how: dict[str, Any] = {} if kind == "dense" else {"train": True}
        net = Dense(10, 54, 64, scale)
        if kind == "convolutions":
            net = models.build("residual", nj.BatchNorm(), classes=10, width=8, depth=27)
        variables = net.init(key, x[:2], **how)
        gains = depth.measure(net, variables, x, key=jax.random.key(seed + 1000), **how)
        row = {"network": kind, "scale": scale, "seed": seed, "relative": lengths(gains)}
        rows.append(row | {"gains": columns(gains)})
        progress.advance(task)
    return {"rows": rows}


def training(options: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """A row for each arm and seed, with what is measured at `MOMENTS`."""
    task = progress.add_task("training", total=len(ARMS) * options.seeds * len(MOMENTS))
    runs = itertools.product(ARMS, range(options.seeds))
    return {
        "moments": MOMENTS,
        "rows": [train(arm, seed, lambda: progress.advance(task)) for arm, seed in runs],
    }


def train(arm: str, seed: int, advance: Any) -> dict[str, Any]:
    """Trains one network and measures it."""
    kind, norms, decay = ARMS[arm]
    x, labels = map(jnp.asarray, gaussians(seed) if kind == "gaussians" else digits())
    net: Any = Dense(50 if kind == "gaussians" else 10, scale=1.0 if norms else None)
    variables = net.init(jax.random.key(seed), x[:2])
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    start, steps = stepper(net, decay)
    params = variables["params"]
    row: dict[str, Any] = {"arm": arm, "seed": seed, "measured": []}
    carry, parts = (params, start(params)), np.arange(max(MOMENTS)).reshape(-1, PART)
    for begin, end in itertools.pairwise((0, *MOMENTS)):
        for numbers in parts[begin // PART : end // PART]:
            carry = steps(carry, rest, x, labels, numbers + 10_000 * seed)
        row["measured"].append(snapshot(net, {"params": carry[0], **rest}, x, labels, seed))
        advance()
    key, variables = jax.random.key(seed), {"params": carry[0], **rest}
    sampled = depth.sample(net, variables, x[:IMAGES], key=key)
    gains = depth.measure(net, variables, x[:IMAGES], key=key)
    exact = depth.network_lengths(gains, weights="energy")
    return row | {"sampled": sampled.share.tolist(), "exact": exact.share.tolist()}


@functools.cache
def stepper(net: Any, decay: float) -> Any:
    """The state of an optimizer, and `PART` steps, of batches of 128 drawn by a number for each."""
    scales = lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key == "scale", tree)
    optimizer = optax.chain(optax.add_decayed_weights(decay, scales), optax.sgd(0.02, momentum=0.9))

    def loss(params, rest, x, labels):
        logits, _ = net.apply({"params": params, **rest}, x, mutable=[*rest])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def steps(carry, rest, x, labels, numbers):
        def step(carry, number):
            params, memory = carry
            batch = jax.random.randint(jax.random.key(number), (128,), 0, len(x))
            slopes = jax.grad(loss)(params, rest, x[batch], labels[batch])
            updates, memory = optimizer.update(slopes, memory, params)
            return (optax.apply_updates(params, updates), memory), None

        return lax.scan(step, carry, numbers)[0]

    return optimizer.init, jax.jit(steps)


def snapshot(net: Any, variables: Any, x: jax.Array, labels: jax.Array, seed: int) -> Any:
    """What is measured of a network at a step."""
    images, wanted = x[:IMAGES], labels[:IMAGES]
    gains = depth.measure(net, variables, images, key=jax.random.key(seed))
    logits, _ = net.apply(variables, images, mutable=["batch_stats"])
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel" and path[0].key != "head"
    ]
    first = variables["params"].get("norm", {}).get("scale")
    return {
        "loss": float(optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()),
        "first_scale": None if first is None else float(jnp.abs(first).mean()),
        "weight_norm": float(np.linalg.norm([jnp.linalg.norm(jnp.ravel(k)) for k in kernels])),
        "relative": lengths(gains),
        "gains": columns(gains),
    }


def cost(options: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Seconds of 56 blocks, and forward passes with and without the calls, alternately."""
    task = progress.add_task("cost", total=2)
    x = jax.random.normal(jax.random.key(0), (1000, 8, 8, 1))
    net = models.build("residual", nj.BatchNorm(), classes=10, width=8, depth=28)
    variables = net.init(jax.random.key(1), x[:2], train=False)
    start = time.perf_counter()
    gains = depth.measure(net, variables, x, key=jax.random.key(2), train=True)
    seconds = time.perf_counter() - start
    progress.advance(task)
    net = resnet.network("normjax", dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (8, 64, 64, 3))
    variables = net.init(jax.random.key(1), x[:1], train=False)

    def every(variables, x):
        calls = layers.calls(net, variables, x, train=False)
        return [(call.args, call.output) for call in calls]

    plain = lambda variables, x: net.apply(variables, x, train=False)
    times = {
        "jit": ratio(jax.jit(plain), jax.jit(every), variables, x),
        "eager": ratio(plain, every, variables, x),
    }
    progress.advance(task)
    return {
        "blocks": len(gains),
        "images": 1000,
        "shape": [8, 8, 1],
        "seconds": seconds,
        "calls": {"batch": 8, "size": 64, "number": len(every(variables, x)), **times},
    }


def ratio(plain: Any, every: Any, *inputs: Any) -> dict[str, float]:
    """Median seconds of two functions by turns, and the second over the first."""
    times: dict[str, list[float]] = {"plain": [], "with": []}
    for turn in range(9):
        for name, run in (("plain", plain), ("with", every)):
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            times[name] += [time.perf_counter() - start] if turn else []
    one, two = (statistics.median(times[name]) for name in ("plain", "with"))
    return {"plain_s": one, "with_s": two, "ratio": two / one}


STUDIES = {"initialization": initialization, "training": training, "cost": cost}
OPTIONS = {"initialization": ("seeds", "images"), "training": ("seeds",), "cost": ()}


def history(row: dict[str, Any]) -> dict[int, dict[str, depth.Gains]]:
    """What `depth.measure` returned, by step, of a row of `training`."""
    found = {}
    for moment, measured in zip(MOMENTS, row["measured"], strict=True):
        every = zip(*(measured["gains"][name] for name in depth.Gains._fields), strict=True)
        found[moment] = {f"block_{i}": depth.Gains(*gains) for i, gains in enumerate(every)}
    return found


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table of a study as text, its head first."""
    if results["study"] == "cost":
        calls, pairs = results["calls"], "{plain_s:.3f} s; {ratio:.3f}"
        lines = [["what", "found"]]
        what = f"gains of {results['blocks']} blocks, {results['images']} images of 8x8"
        lines.append([what, f"{results['seconds']:.0f} s"])
        for how in ("jit", "eager"):
            what = f"ResNet-50, {calls['size']} pixels, {how}; with {calls['number']} calls"
            lines.append([f"{what}, relative", pairs.format(**calls[how])])
        return lines
    kinds = ("jacobian, amplitude", "jacobian, energy", "forward, amplitude")
    if results["study"] == "initialization":
        lines = [["network", "scale", *kinds]]
        groups = dict.fromkeys((row["network"], row["scale"]) for row in results["rows"])
        for name, scale in groups:
            rows = [r for r in results["rows"] if (r["network"], r["scale"]) == (name, scale)]
            means = ([row["relative"][kind] for row in rows] for kind in kinds)
            lines.append([name, f"{scale:g}", *map(text, means)])
        return lines
    lines = [["network", "step", "loss", "scale of blocks", "of the first layer", *kinds]]
    for arm, (i, step) in itertools.product(ARMS, enumerate(MOMENTS)):
        found = [row["measured"][i] for row in results["rows"] if row["arm"] == arm]
        scales = [[np.mean(one["gains"]["scale"])] for one in found if one["first_scale"]]
        firsts = [one["first_scale"] for one in found if one["first_scale"]]
        means = ([one["relative"][kind] for one in found] for kind in kinds)
        of_scales = (text([s for (s,) in scales]), text(firsts)) if firsts else ("", "")
        lines.append([arm, str(step), text([one["loss"] for one in found]), *of_scales])
        lines[-1] += map(text, means)
    return lines


def text(values: Sequence[float]) -> str:
    """Mean and half of its 95 % interval."""
    half = report.interval(list(values))
    return f"{np.mean(values):.3f} ± {'n/a' if half is None else f'{half:.3f}'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs studies, writes their files and figures and prints tables; 2 after bad input."""
    from rich.progress import Progress

    options = _options(sys.argv[1:] if argv is None else argv)
    try:
        for name in options.studies:
            with Progress(transient=True) as progress:
                found = STUDIES[name](options, progress)
            configuration = {field: getattr(options, field) for field in OPTIONS[name]}
            head = machine.heading("depth", "flax", "optax", "scikit-learn")
            results = {**head, "study": name, "configuration": configuration, **found}
            machine.write(results, options.output / f"{name}.json", indent=None, allow_nan=False)
            results = json.loads((options.output / f"{name}.json").read_text())
            if name == "training":
                draw(results, options.output / "training.png")
            print(*(" | ".join(line) for line in cells(results)), sep="\n")
    except (ValueError, OSError) as error:
        print("depth:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"Written to {options.output}/")
    return 0


def draw(results: dict[str, Any], file: Path) -> None:
    """Draws the distributions of path lengths of the first row over training."""
    rows = depth.distributions(history(results["rows"][0]))
    figures.plot(rows, "length", ["share"], by="step").savefig(file, dpi=150)


def _options(argv):
    parser = Studies("depth", __doc__, STUDIES)
    text = "of initialization and training"
    parser.add_argument("--seeds", type=whole, default=3, help=text)
    parser.add_argument("--images", type=whole, default=256, help="of initialization")
    return parser.read(argv)


if __name__ == "__main__":
    sys.exit(main())
