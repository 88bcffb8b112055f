"""Times normjax beside flax.linen, and PyTorch where installed: `python -m benchmarks.speed`.

Spectral norms stand beside flax.linen's BatchNorm, a plain implementation with `jnp.fft`, and no
more than a transform and its inverse. Norms with ghost noise stand beside flax.linen's BatchNorm,
alone and with dropout. Norms with further inputs stand beside normjax's norm without them, "plain",
and beside the same written with flax.linen and jnp. Whitening stands beside flax.linen's BatchNorm,
the formula as its authors write it, "plain", and the matrix products alone.

A training step (forward and backward pass with a given cotangent, in one compiled program) of each
method is timed in turns with its peers. Beside the time ratios stand what does not depend on the
machine's mood: bytes accessed and temporaries of the compiled program and the bytes that reverse
mode keeps, all in units of the input.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import inputs, machine, whiteners

# Large blocks come from the heap and stay mapped; otherwise page faults are what is measured.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
IMAGES = ((64, 32, 32, 64), (128, 16, 16, 128), (32, 56, 56, 64))
TOKENS = ((64, 197, 384), (4096, 768))
CASES = {
    "BatchNorm": (*IMAGES, (4096, 512)),
    "BatchNorm, relu": IMAGES,
    "Ghost, 4 groups": IMAGES,
    "GhostBatchNorm": IMAGES,
    "ExclusiveBatchNorm": IMAGES,
    "GhostNoiseBatchNorm": IMAGES,
    "BatchNorm, GhostNoise, Affine": IMAGES,
    "GroupNorm": IMAGES,
    "InstanceNorm": IMAGES,
    "LayerNorm": TOKENS,
    "RMSNorm": TOKENS,
    "SpectralBatchNorm": IMAGES,
    "SpectralBatchNorm, half": IMAGES,
    "SpectralBatchNorm, frequency": IMAGES,
    "SpectralBatchNorm, frequency, fft": IMAGES,
    **inputs.CASES,
    **whiteners.CASES,
}
# Passes over the activation, forward and backward, that no schedule goes below: two kernels each
# way where statistics cross samples, one each way where a sample's row or group fits on chip.
ROWS = ("GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "LayerNorm, heads", "RMSNorm, heads")
LOWER_BOUND = {
    **dict.fromkeys((*ROWS, "AdaptiveLayerNorm"), 5),
    **dict.fromkeys(("RMSNorm, gated", "LayerNorm, residual", "RMSNorm, residual"), 8),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the table and writes `speed.json` and `speed.png`."""
    options = _options(argv)
    if argv is None:
        keep_memory("speed")
    results = run(options)
    machine.write(results, options.output / "speed.json")
    show(results)
    plot(results, options.output / "speed.png")
    print(f"Written to {options.output}/speed.json and speed.png")
    return 0


def keep_memory(benchmark: str) -> None:
    """Starts the command line of a benchmark anew with `ALLOCATOR`, on Linux, if it lacks it."""
    if sys.platform == "linux" and not ALLOCATOR.items() <= os.environ.items():
        arguments = [sys.executable, "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **ALLOCATOR})


def _options(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument(
        "--methods", nargs="+", default=list(CASES), choices=list(CASES), metavar="METHOD"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=25, help="interleaved repetitions")
    parser.add_argument(
        "--scale", type=int, default=1, help="factor on the batch, for accelerators"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument(
        "--no-network", action="store_true", help="leave the compile times of a network out"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    options = parser.parse_args(argv)
    for name in ("rounds", "scale"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not a positive number")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements as one JSON-ready dict."""
    import jax
    from rich.progress import Progress

    from benchmarks.torch_peer import Peer

    gpu = jax.default_backend() != "cpu"
    peer = Peer(gpu=gpu)
    peer.available = peer.available and not options.no_torch
    rows = []
    todo = [
        (method, (shape[0] * options.scale, *shape[1:]), dtype)
        for method in options.methods
        for shape in CASES[method]
        for dtype in options.dtypes
    ]
    with Progress(transient=True) as progress:
        task = progress.add_task("speed", total=len(todo))
        for case in todo:
            progress.update(task, description=" ".join(map(str, case)))
            rows.append(measure(*case, peer, options.rounds, repeats=20 if gpu else 1))
            progress.advance(task)
    results = {
        **machine.heading("speed", "flax"),
        "rows": rows,
        "compile_50_layers": None if options.no_network else compile_network(),
    }
    if peer.available:
        results["versions"]["torch"] = peer.version
    peer.close()
    return results


def measure(
    method: str, shape: tuple[int, ...], dtype: str, peer: Any, rounds: int, repeats: int
) -> dict[str, Any]:
    """One row: static figures of both programs and time ratios, the peers taking turns.

    Args:
      method: a key of `CASES`.
      shape: shape of the input.
      dtype: its dtype.
      peer: the PyTorch process.
      rounds: how many times everyone takes a turn.
      repeats: steps in a row per turn, of which the mean counts.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    x, g = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(2))
    key = jax.random.key(2)
    row: dict[str, Any] = {"method": method, "shape": list(shape), "dtype": dtype}
    turns: dict[str, Callable[[], float]] = {}
    if method in whiteners.CASES:
        found = whiteners.programs(method, shape)
    elif method in inputs.CASES:
        found = inputs.programs(method, shape, dtype)
    else:
        found = programs(method, shape[1:-1], shape[-1])
    for name, (variables, apply) in found.items():

        def step(variables, x, g, key, apply=apply):
            (y, new), pullback = jax.vjp(lambda v, x: apply(v, x, key), variables, x)
            return y, new, pullback((g, jax.tree.map(jnp.zeros_like, new)))

        start = time.perf_counter()
        compiled = jax.jit(step).lower(variables, x, g, key).compile()
        row[f"{name}_compile_s"] = time.perf_counter() - start
        row[f"{name}_bytes"] = _static(compiled)[0] / x.nbytes
        row[f"{name}_temporaries"] = _static(compiled)[1] / x.nbytes
        row[f"{name}_kept"] = _kept(apply, variables, x, key)

        def turn(compiled=compiled, variables=variables):
            jax.block_until_ready(compiled(variables, x, g, key))  # caches as this one leaves them
            start = time.perf_counter()
            for _ in range(repeats):
                out = compiled(variables, x, g, key)
            jax.block_until_ready(out)
            return (time.perf_counter() - start) / repeats

        turn()
        turns[name] = turn
    if peer.prepare(method, shape, dtype):
        turns["torch"] = lambda: peer.step(repeats)
        turns["torch"]()
    times = np.array([[turn() for turn in turns.values()] for _ in range(rounds)])
    row["lower_bound"] = LOWER_BOUND.get(method, 8)
    for name, column in zip(turns, times.T, strict=True):
        row[f"{name}_ms"] = float(np.median(column) * 1e3)
        if name != "normjax":
            ratio = np.quantile(times[:, 0] / column, (0.5, 0.25, 0.75))
            row[f"ratio_{name}"], row[f"ratio_{name}_low"], row[f"ratio_{name}_high"] = map(
                float, ratio
            )
    return row


def _static(compiled):
    """Bytes accessed and bytes of temporaries, as the compiler counts them."""
    return compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes


def programs(
    method: str, sizes: tuple[int, ...], channels: int, dtype: Any = None
) -> dict[str, tuple[Any, Callable]]:
    """Variables and `apply(variables, x, key) -> (y, new statistics)` of normjax and its peers.

    Args:
      method: a key of `CASES`.
      sizes: of the positions of a sample.
      channels: number of channels.
      dtype: of the layer of flax.linen; without one it follows from those of its arrays.
    """
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    import normjax as nj
    from normjax.core.method import traits

    spectral = functools.partial(nj.SpectralBatchNorm, statistics="frequency", map_size=sizes)
    ours = {
        "BatchNorm": lambda: nj.BatchNorm(),
        "BatchNorm, relu": lambda: nj.BatchNorm(activation=jax.nn.relu),
        "Ghost, 4 groups": lambda: nj.Ghost(nj.BatchNorm(), groups=4),
        "GhostBatchNorm": lambda: nj.GhostBatchNorm(16),
        "ExclusiveBatchNorm": lambda: nj.ExclusiveBatchNorm(),
        "GhostNoiseBatchNorm": lambda: nj.GhostNoiseBatchNorm(16),
        "BatchNorm, GhostNoise, Affine": lambda: nj.chain(
            nj.BatchNorm(use_scale=False, use_bias=False), nj.GhostNoise(16), nj.Affine()
        ),
        "GroupNorm": lambda: nj.GroupNorm(32),
        "InstanceNorm": lambda: nj.InstanceNorm(),
        "LayerNorm": lambda: nj.LayerNorm(),
        "RMSNorm": lambda: nj.RMSNorm(),
        "SpectralBatchNorm": lambda: nj.SpectralBatchNorm(),
        "SpectralBatchNorm, half": lambda: nj.SpectralBatchNorm(spectrum="half"),
        "SpectralBatchNorm, frequency": lambda: spectral(),
        "SpectralBatchNorm, frequency, fft": lambda: spectral(route="fft"),
    }[method]()
    kind = method if hasattr(nn, method) else "BatchNorm"
    switch = {"use_running_average": False} if kind == "BatchNorm" else {}
    theirs = getattr(nn, kind)(dtype=dtype, **switch)
    variables = jax.jit(theirs.init)(jax.random.key(0), jnp.ones((2, 2, 2, channels)))
    after = jax.nn.relu if method == "BatchNorm, relu" else lambda y: y

    def flax(variables, x, key):
        y, new = theirs.apply(variables, x, mutable=["batch_stats"])
        return after(y.astype(x.dtype)), new

    def normjax(variables, x, key):
        draw = {"key": key} if traits(ours).random else {}
        return ours.apply(*variables, x, train=True, **draw)

    def dropout(variables, x, key):
        y, new = flax(variables, x, key)
        return nn.Dropout(0.1, deterministic=False).apply({}, y, rngs={"dropout": key}), new

    found = {"normjax": (ours.init(None, channels), normjax), "flax": (variables, flax)}
    if traits(ours).random:
        found["flax_dropout"] = variables, dropout
    if isinstance(ours, nj.SpectralBatchNorm):
        one = (1, 1, 1, channels)
        params = jnp.ones(one), jnp.zeros(one)
        found["plain_fft"] = params, functools.partial(_plain_fft, ours)
        found["fft_pair"] = params, functools.partial(_plain_fft, None)
    return found


def _plain_fft(method, variables, x, key):
    """Spectral batch norm of [N, H, W, C] as its formula reads; no method: there and back only."""
    import jax.numpy as jnp
    from jax import lax

    (scale, bias), new = variables, ()
    how: dict[str, Any] = {"axes": (1, 2), "norm": "ortho"}
    spectrum = jnp.fft.rfft2(x.astype(jnp.float32), **how)
    if method is not None:
        axes = (0,) if method.statistics == "frequency" else (0, 1, 2)
        mean = spectrum.mean(axes, keepdims=True)
        var = jnp.square(jnp.abs(spectrum - mean)).mean(axes, keepdims=True)
        spectrum = (spectrum - mean) * lax.rsqrt(var + method.epsilon) * scale + bias
        new = lax.stop_gradient((mean, var))
    return jnp.fft.irfft2(spectrum, x.shape[1:3], **how).astype(x.dtype), new


def _kept(apply, variables, x, key):
    """Bytes kept for reverse mode across a jit boundary, per byte of input."""
    import jax

    output = lambda v, x: apply(v, x, key)[0]
    _, pullback = jax.jit(lambda v, x: jax.vjp(output, v, x))(variables, x)
    return sum(a.nbytes for a in jax.tree.leaves(pullback)) / x.nbytes


def compile_network(layers: int = 50) -> dict[str, float]:
    """Seconds to trace, lower and compile a training step of a network with `layers` norms."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    import normjax.linen

    class Network(nn.Module):
        norm: Any

        @nn.compact
        def __call__(self, x):
            for i in range(layers):
                y = nn.Conv(32 * (1 + i // 17), (1, 1), use_bias=False)(x)
                x = nn.relu(self.norm(use_running_average=False)(y))
            return x.mean()

    seconds: dict[str, list[float]] = {"normjax": [], "flax": []}
    x = jnp.ones((8, 8, 8, 32))
    for _ in range(3):
        for name, norm in (("normjax", normjax.linen.BatchNorm), ("flax", nn.BatchNorm)):
            network = Network(norm)
            variables = jax.eval_shape(network.init, jax.random.key(0), x)

            def loss(params, stats, network=network):
                tree = {"params": params, "batch_stats": stats}
                return network.apply(tree, x, mutable=["batch_stats"])

            jax.clear_caches()
            start = time.perf_counter()
            step = jax.jit(jax.value_and_grad(loss, has_aux=True))
            step.lower(variables["params"], variables["batch_stats"]).compile()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    return {**best, "ratio": best["normjax"] / best["flax"]}


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title="Training step, normjax relative to its peers; bytes in units of the input")
    for name in (
        "method",
        "shape",
        "dtype",
        "ms",
        "/ flax",
        "/ torch",
        "/ plain",
        "/ products",
        "/ plain FFT",
        "/ FFT pair",
        "/ flax + dropout",
        "bytes (flax, bound)",
        "kept (flax)",
        "temporary (flax)",
        "compile s (flax)",
    ):
        table.add_column(name, justify="left" if name in ("method", "shape", "dtype") else "right")
    for row in results["rows"]:
        ratio = "{ratio_flax:.2f} [{ratio_flax_low:.2f}, {ratio_flax_high:.2f}]".format(**row)
        others = (
            f"{row[name]:.2f}" if (name := f"ratio_{peer}") in row else ""
            for peer in ("torch", "plain", "products", "plain_fft", "fft_pair", "flax_dropout")
        )
        table.add_row(
            row["method"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            f"{row['normjax_ms']:.2f}",
            ratio,
            *others,
            "{normjax_bytes:.1f} ({flax_bytes:.1f}, {lower_bound})".format(**row),
            "{normjax_kept:.2f} ({flax_kept:.2f})".format(**row),
            "{normjax_temporaries:.2f} ({flax_temporaries:.2f})".format(**row),
            "{normjax_compile_s:.2f} ({flax_compile_s:.2f})".format(**row),
        )
    console.print(table)
    for (method, dtype), values in _medians(results).items():
        console.print(f"median over shapes, {method}, {dtype}: {values:.2f} x flax")
    if network := results["compile_50_layers"]:
        console.print(
            "50-norm network, trace, lower and compile: {normjax:.2f} s, flax {flax:.2f} s, "
            "ratio {ratio:.2f}".format(**network)
        )


def _medians(results):
    import numpy as np

    found: dict[tuple[str, str], list[float]] = {}
    for row in results["rows"]:
        found.setdefault((row["method"], row["dtype"]), []).append(row["ratio_flax"])
    return {case: float(np.median(values)) for case, values in found.items()}


def plot(results: dict[str, Any], path: Path) -> None:
    """Time ratios with their quartiles, and bytes accessed, of every row."""
    from matplotlib.figure import Figure

    rows = results["rows"][::-1]
    figure = Figure(figsize=(11, 0.28 * len(rows) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [f"{r['method']}  {'x'.join(map(str, r['shape']))}  {r['dtype']}" for r in rows]
    colors = ["#0072B2" if r["dtype"] == "float32" else "#E69F00" for r in rows]
    ratio = [r["ratio_flax"] for r in rows]
    spread = [
        [r["ratio_flax"] - r["ratio_flax_low"] for r in rows],
        [r["ratio_flax_high"] - r["ratio_flax"] for r in rows],
    ]
    left.barh(labels, ratio, xerr=spread, color=colors, ecolor="#444444", height=0.7)
    left.axvline(1, color="black", linewidth=1)
    left.set(xlabel="time of a training step / flax.linen (median, quartiles)", xlim=(0, None))
    right.barh(
        labels, [r["flax_bytes"] for r in rows], color="#dddddd", height=0.7, label="flax.linen"
    )
    right.barh(
        labels, [r["normjax_bytes"] for r in rows], color=colors, height=0.7, label="normjax"
    )
    right.plot([r["lower_bound"] for r in rows], labels, "k|", markersize=9, label="lower bound")
    right.set(xlabel="bytes accessed / bytes of the input")
    right.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.01)
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, jax {results['versions']['jax']}", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
