"""Predicted variances in random networks, and what predictions cost: `python -m benchmarks.stacks`.

Every layer of a stack is a batch norm with random scale and bias, a ReLU and a 3x3 convolution with
padding, initialized as He et al. 2015. What `normjax.propagate` predicts for the variances of its
output stands beside other predictions and the truth over the batch. Costs are those of a prediction
with its gradients, relative to the convolution and to a sampled batch; and those of a training step
of a residual network with Kalman norms, relative to the same network with batch norms.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import normjax as nj
from benchmarks import machine, models
from benchmarks.options import whole
from normjax import propagate

SHAPES = ((64, 32, 32, 16), (64, 32, 32, 64), (128, 16, 16, 128))
INPUTS = ("white", "smooth")
TERMS = 8  # of the Hermite series of a rectified covariance


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints two tables and writes `stacks.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stacks", description=__doc__)
    parser.add_argument("--depth", type=whole, default=4, help="layers of a stack")
    parser.add_argument("--seeds", type=whole, default=2, help="stacks of each kind")
    parser.add_argument("--rounds", type=whole, default=15, help="interleaved repetitions")
    parser.add_argument("--shrink", type=whole, default=1, help="divides the batches, for a try")
    parser.add_argument("--output", type=Path, default=Path("runs/stacks"))
    options = parser.parse_args(argv)
    results = run(options)
    machine.write(results, options.output / "stacks.json")
    show(results)
    print(f"Written to {options.output}/stacks.json")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements as one JSON-ready dict."""
    shapes = [(max(shape[0] // options.shrink, 2), *shape[1:]) for shape in SHAPES]
    keys = jax.random.split(jax.random.key(0), options.seeds)
    accuracy = []
    for shape in shapes:
        for kind in INPUTS:
            one = jax.jit(functools.partial(errors, shape=shape, depth=options.depth, kind=kind))
            found = [jax.device_get(one(key)) for key in keys]
            layers = {n: np.mean([f[n] for f in found], 0).tolist() for n in found[0]}
            accuracy.append({"shape": list(shape), "input": kind, "errors": layers})
    return {
        **machine.heading("stacks"),
        "seeds": options.seeds,
        "accuracy": accuracy,
        "costs": [costs(shape, options.rounds) for shape in shapes],
        "training_step": training_step(shapes[0][0], options.rounds),
    }


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of a layer, [N, H, W, C]."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def draw_layer(key: jax.Array, channels: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scale in [0.5, 1.5], bias of deviation 0.5, and the kernel behind them."""
    a, b, c = jax.random.split(key, 3)
    scale = 0.5 + jax.random.uniform(a, (channels,))
    bias = 0.5 * jax.random.normal(b, (channels,))
    kernel = jax.random.normal(c, (3, 3, channels, channels)) * math.sqrt(2 / 9 / channels)
    return scale, bias, kernel


def draw_input(key: jax.Array, shape: tuple[int, ...], kind: str) -> jax.Array:
    """White noise, or noise with amplitudes of one over the frequency, independent by channel."""
    x = jax.random.normal(key, shape)
    if kind == "white":
        return x
    axes = [np.fft.fftfreq(n) * n for n in shape[1:3]]
    frequency = np.hypot(axes[0][:, None], axes[1][None])
    amplitude = jnp.asarray(1 / np.maximum(frequency, 1), jnp.float32)[None, :, :, None]
    return jnp.fft.ifft2(jnp.fft.fft2(x, axes=(1, 2)) * amplitude, axes=(1, 2)).real


def errors(
    key: jax.Array, *, shape: tuple[int, ...], depth: int, kind: str = "white"
) -> dict[str, jax.Array]:
    """Medians over channels of |predicted variance / true - 1|, for each layer of a stack.

    Args:
      key: draws the stack, its input and the sampled images.
      shape: of the input, [N, H, W, C].
      depth: number of layers.
      kind: of `INPUTS`.

    Returns:
      f32[depth] each for the closed form, the closed form without borders, a sampled batch as large
      as the true one (the same assumptions, with the noise of a sample), and the closed form that
      follows all covariances of channels.
    """
    channels, norm = shape[-1], nj.BatchNorm(activation=jax.nn.relu)
    first, *layers = jax.random.split(key, depth + 1)
    x = draw_input(first, shape, kind)
    _, state = norm.init(None, channels)
    covariance, rows = jnp.eye(channels), []
    for layer in layers:
        drawn, sampling = jax.random.split(layer)
        scale, bias, kernel = draw_layer(drawn, channels)
        y, _ = norm.apply(nj.AffineParams(scale, bias), state, x, train=True)
        x = convolve(y, kernel)
        output = propagate.prediction(bias, jnp.square(scale))
        images = jax.random.normal(sampling, shape)
        sampled = jax.nn.relu(images * scale[None, None, None] + bias[None, None, None])
        borders = functools.partial(propagate.conv, kernel=kernel, size=shape[1:3])
        deviation = jnp.sqrt(jnp.diagonal(covariance))
        covariance = rectified(output, covariance / jnp.outer(deviation, deviation))
        var, covariance = through(covariance, propagate.relu(output).mean, borders, kernel)
        rows.append(
            {
                "closed form": borders(propagate.relu(output)).var,
                "without borders": borders(propagate.relu(output), padding="CIRCULAR").var,
                "sampled batch": convolve(sampled, kernel).var((0, 1, 2)),
                "channel covariance": var,
            }
        )
        true = x.var((0, 1, 2))
        rows[-1] = {n: jnp.median(jnp.abs(found / true - 1)) for n, found in rows[-1].items()}
    return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


def rectified(moments: nj.Moments, correlation: jax.Array) -> jax.Array:
    """Covariance f32[C, C] of `max(x, 0)` for normal numbers x with this correlation.

    By the series of Hermite polynomials, sum over k of correlation^k a_k a_k' / k!, with a_1 the
    deviation times P(x > 0) and a_k = deviation (-1)^k He_{k-2}(t) density(t) at t = mean /
    deviation; the diagonal is exact.
    """
    deviation = jnp.sqrt(moments.var)
    t = moments.mean / deviation
    density = jax.scipy.stats.norm.pdf(t) * deviation
    polynomials = [jnp.ones_like(t), t]
    for k in range(1, TERMS):
        polynomials.append(t * polynomials[k] - k * polynomials[k - 1])
    first = deviation * jax.scipy.stats.norm.cdf(t)
    rest = [(-1) ** k * density * polynomials[k - 2] for k in range(2, TERMS + 1)]
    total = sum(
        correlation**k * jnp.outer(a, a) / math.factorial(k)
        for k, a in enumerate([first, *rest], start=1)
    )
    exact = jnp.diag(propagate.relu(moments).var)
    return jnp.where(jnp.eye(len(t), dtype=bool), exact, total)


def through(
    covariance: jax.Array, mean: jax.Array, conv: Callable, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Variances f32[C] behind a convolution and its border, and the covariance f32[C, C] inside."""
    products = jnp.einsum("hwio,ij,hwjp->hwop", kernel, covariance, kernel)
    seen = [1 - 1 / conv.keywords["size"][axis] * jnp.array([1, 0, 1]) for axis in (0, 1)]
    share = jnp.einsum("h,w,hwoo->o", *seen, products)
    of_means = conv(propagate.prediction(mean, jnp.zeros_like(mean))).var
    return share + of_means, products.sum((0, 1))


def costs(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Medians of the time of a prediction, over that of the convolution and of a sampled batch.

    All with ReLU, and predictions and samples with gradients of scale, bias and kernel too; the
    convolution is its forward pass alone.
    """
    scale, bias, kernel = draw_layer(jax.random.key(0), shape[-1])
    x = jax.random.normal(jax.random.key(1), shape)

    def predict(scale, bias, kernel):
        moments = propagate.relu(propagate.prediction(bias, jnp.square(scale)))
        return propagate.conv(moments, kernel, size=shape[1:3])[1:]

    def sample(scale, bias, kernel):
        images = jax.random.normal(jax.random.key(2), shape)
        y = convolve(jax.nn.relu(images * scale[None, None, None] + bias[None, None, None]), kernel)
        return y.mean((0, 1, 2)), y.var((0, 1, 2))

    def with_gradients(function):
        def step(scale, bias, kernel):
            out, back = jax.vjp(function, scale, bias, kernel)
            return out, back(jax.tree.map(jnp.ones_like, out))

        return step

    programs = {
        "convolution": (jax.jit(convolve), (x, kernel)),
        "prediction": (jax.jit(predict), (scale, bias, kernel)),
        "prediction with gradients": (jax.jit(with_gradients(predict)), (scale, bias, kernel)),
        "sampled batch": (jax.jit(sample), (scale, bias, kernel)),
        "sampled batch with gradients": (jax.jit(with_gradients(sample)), (scale, bias, kernel)),
    }
    seconds = interleaved(programs, rounds)
    median = {name: float(np.median(column)) * 1e3 for name, column in seconds.items()}
    ratio = lambda a, b: float(np.median(seconds[a] / seconds[b]))
    return {
        "shape": list(shape),
        "ms": median,
        "over_convolution": ratio("prediction", "convolution"),
        "with_gradients_over_convolution": ratio("prediction with gradients", "convolution"),
        "over_sampled": ratio("prediction", "sampled batch"),
        "with_gradients_over_sampled": ratio(
            "prediction with gradients", "sampled batch with gradients"
        ),
    }


def interleaved(programs: dict[str, Any], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every program, which take turns; cheap ones several times a turn."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    repeats = {}
    for name, (program, arguments) in programs.items():
        jax.block_until_ready(program(*arguments))
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        repeats[name] = max(1, min(100, int(0.005 / (time.perf_counter() - start))))
    for _ in range(rounds):
        for name, (program, arguments) in programs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                jax.block_until_ready(program(*arguments))
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: np.array(column) for name, column in times.items()}


def training_step(batch: int, rounds: int) -> dict[str, Any]:
    """Time of a gradient of the residual network with Kalman norms over one with batch norms."""
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    programs = {}
    for name, method in (("BatchNorm", nj.BatchNorm()), ("KalmanNorm", nj.KalmanNorm(gain=0.3))):
        network = models.build("residual", method, classes=10)
        variables = network.init(jax.random.key(1), x, train=False)

        def loss(params, stats, x, network=network):
            tree = {"params": params, "batch_stats": stats}
            y, new = network.apply(tree, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jax.nn.logsumexp(y, -1)), new

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        programs[name] = step, (variables["params"], variables["batch_stats"], x)
    seconds = interleaved(programs, rounds)
    quantiles = np.quantile(seconds["KalmanNorm"] / seconds["BatchNorm"], (0.5, 0.25, 0.75))
    return {
        "shape": list(x.shape),
        "ms": {name: float(np.median(column)) * 1e3 for name, column in seconds.items()},
        **dict(zip(("ratio", "low", "high"), map(float, quantiles), strict=True)),
    }


def show(results: dict[str, Any]) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    names = list(results["accuracy"][0]["errors"])
    table = Table(title="Median |predicted variance / true - 1| by layer")
    for name in ("shape", "input", *names):
        table.add_column(name)
    for row in results["accuracy"]:
        shape = "x".join(map(str, row["shape"]))
        cells = (" ".join(f"{e:.3f}" for e in row["errors"][name]) for name in names)
        table.add_row(shape, row["input"], *cells)
    console.print(table)
    table = Table(title="Time of a prediction, relative")
    for name in ("shape", "/ convolution", "with gradients", "/ sampled batch", "with gradients"):
        table.add_column(name)
    for row in results["costs"]:
        ratios = (v for k, v in row.items() if k.endswith(("convolution", "sampled")))
        table.add_row("x".join(map(str, row["shape"])), *(f"{ratio:.4f}" for ratio in ratios))
    console.print(table)
    step = results["training_step"]
    print(
        f"training step of the residual network, KalmanNorm over BatchNorm: {step['ratio']:.2f} "
        f"[{step['low']:.2f}, {step['high']:.2f}]"
    )


if __name__ == "__main__":
    sys.exit(main())
