"""Measures where Flax's norms go wrong beside normjax: `python -m benchmarks.guarantees`.

Every row is one run of both libraries on the same data against a float64 answer. Eight devices are
simulated on the CPU.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all measurements, prints them and writes `guarantees.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guarantees", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/guarantees"))
    options = parser.parse_args(argv)
    flags = "--xla_force_host_platform_device_count=8"
    if argv is None and flags not in os.environ.get("XLA_FLAGS", ""):
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "JAX_PLATFORMS": "cpu",
        }
        arguments = [sys.executable, "-m", "benchmarks.guarantees", *sys.argv[1:]]
        os.execve(sys.executable, arguments, environment)
    results = run()
    machine.write(results, options.output / "guarantees.json")
    show(results["rows"])
    print(f"Written to {options.output}/guarantees.json")
    return 0


def run() -> dict[str, Any]:
    """All rows with the machine and the versions."""

    rows = []
    for measurement in MEASUREMENTS:
        text, unit = (measurement.__doc__ or "").strip().rstrip(".").rsplit(": ", 1)
        flax_value, ours = measurement()
        rows.append({"case": text, "measure": unit, "flax": flax_value, "normjax": ours})
    return {
        **machine.heading("guarantees", "flax"),
        "rows": rows,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Flax and normjax on the same data")
    for name in ("case", "measure", "flax", "normjax"):
        table.add_column(name, justify="right" if name in ("flax", "normjax") else "left")
    for row in rows:
        table.add_row(row["case"], row["measure"], text(row["flax"]), text(row["normjax"]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def text(value):
    if isinstance(value, str):
        return value
    return "NaN" if value is None else f"{value:.2g}"


def _finite(value):
    """A float, or None (JSON has no NaN) where it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


def _both(measure: Callable[[Any], Any]) -> tuple[Any, Any]:
    from flax import linen as nn

    import normjax.linen

    return measure(nn), measure(normjax.linen)


def _train(norm, x, **how):
    """Output and new statistics of one training step from initial values."""
    import jax

    variables = norm.init(jax.random.key(0), x, use_running_average=True)
    return norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **how)


def offset_variance():
    """BatchNorm, float32, deviation 1 at mean 10 000, first step: relative error of variance."""
    import numpy as np

    x = (1e4 + np.random.default_rng(0).standard_normal((4096, 16))).astype(np.float32)
    exact = x.astype(np.float64).var(0)

    def error(library):
        _, new = _train(library.BatchNorm(momentum=0.0), x)
        return _finite(np.max(np.abs(np.asarray(new["batch_stats"]["var"]) / exact - 1)))

    return _both(error)


def offset_layer_norm():
    """LayerNorm, float32, deviation 1 at mean 1 000: largest error of the output."""
    import jax
    import numpy as np

    x = (1e3 + np.random.default_rng(0).standard_normal((256, 512))).astype(np.float32)
    wide = x.astype(np.float64)
    exact = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)

    def error(library):
        norm = library.LayerNorm()
        return _finite(np.max(np.abs(norm.apply(norm.init(jax.random.key(0), x), x) - exact)))

    return _both(error)


def ragged_devices():
    """BatchNorm over 8 devices, valid rows unequally many: relative error of variance."""
    import jax
    import numpy as np

    draw = np.random.default_rng(0)
    x = draw.normal(draw.normal(0, 4, (8, 1, 1)), 1, (8, 16, 4)).astype(np.float32)
    mask = np.arange(16)[None, :, None] < draw.integers(1, 17, (8, 1, 1))
    exact = x[mask[..., 0]].astype(np.float64).var(0)

    def error(library):
        norm = library.BatchNorm(momentum=0.0, axis_name="batch")
        step = jax.pmap(lambda x, mask: _train(norm, x, mask=mask)[1], axis_name="batch")
        return _finite(np.max(np.abs(step(x, mask)["batch_stats"]["var"][0] / exact - 1)))

    return _both(error)


def empty_device():
    """BatchNorm over 8 devices, one without valid rows: finite share of the others' output."""
    import jax
    import numpy as np

    x = np.random.default_rng(0).standard_normal((8, 16, 4)).astype(np.float32)
    mask = np.arange(8)[:, None, None] > 0

    def share(library):
        norm = library.BatchNorm(axis_name="batch")
        step = jax.pmap(lambda x, mask: _train(norm, x, mask=mask)[0], axis_name="batch")
        return _finite(np.isfinite(step(x, mask)[1:]).mean())

    return _both(share)


def nan_padding():
    """BatchNorm, NaN in masked rows: finite share of the other rows' gradient."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    mask = np.arange(16)[:, None] < 12
    x[12:] = np.nan

    def share(library):
        norm = library.BatchNorm()

        def loss(x):
            return jnp.sum(jnp.where(mask, jnp.sin(_train(norm, x, mask=mask)[0]), 0))

        return _finite(np.isfinite(jax.grad(loss)(x)[:12]).mean())

    return _both(share)


def empty_mask():
    """BatchNorm, no valid row at all: finite share of the running statistics."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)

    def share(library):
        _, new = _train(library.BatchNorm(), x, mask=np.zeros((16, 1), bool))
        return _finite(np.isfinite(new["batch_stats"]["mean"]).mean())

    return _both(share)


def bad_batch():
    """BatchNorm, one inf (normjax: skip_nonfinite): finite share of the running statistics."""
    import numpy as np
    from flax import linen as nn

    import normjax.linen

    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    x[0] = np.inf

    def share(norm):
        return _finite(np.isfinite(_train(norm, x)[1]["batch_stats"]["var"]).mean())

    return share(nn.BatchNorm()), share(normjax.linen.BatchNorm(skip_nonfinite=True))


def group_mask():
    """GroupNorm with a mask of positions (N, H, W, 1): accepted."""
    import jax
    import numpy as np

    x = np.random.default_rng(0).standard_normal((2, 4, 4, 32)).astype(np.float32)
    mask = np.arange(4)[None, :, None, None] < 3

    def accepted(library):
        norm = library.GroupNorm(8)
        try:
            norm.apply(norm.init(jax.random.key(0), x), x, mask=np.broadcast_to(mask, (2, 4, 4, 1)))
        except (TypeError, ValueError) as error:
            return f"no ({type(error).__name__})"
        return "yes"

    return _both(accepted)


def explicit_groups():
    """GroupNorm with channels sharded over an Explicit mesh: accepted."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))

    def accepted(library):
        norm = library.GroupNorm(8)
        variables = norm.init(jax.random.key(0), jnp.ones((2, 4, 4, 32)))
        spec = PartitionSpec(None, None, None, "model")
        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.ones((2, 4, 4, 32)), NamedSharding(mesh, spec))
            try:
                jax.jit(norm.apply)(variables, x)
            except Exception as error:
                return f"no ({type(error).__name__})"
        return "yes"

    return _both(accepted)


def half_precision_evaluation():
    """NNX BatchNorm(dtype=bfloat16), evaluation: mean error over that of rounding once."""
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np
    from flax import nnx

    import normjax.nnx

    draw = np.random.default_rng(0)
    x = (3 + draw.standard_normal((512, 64))).astype(ml_dtypes.bfloat16)
    mean, var = 3 + 0.1 * draw.standard_normal(64), 1 + 0.1 * draw.random(64)
    mean, var = mean.astype(np.float32), var.astype(np.float32)
    exact = (x.astype(np.float64) - mean) / np.sqrt(var.astype(np.float64) + 1e-5)
    rounding = np.mean(np.abs(exact.astype(ml_dtypes.bfloat16).astype(np.float64) - exact))

    def ratio(library):
        norm = library.BatchNorm(64, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
        norm.mean[...], norm.var[...] = jnp.asarray(mean), jnp.asarray(var)
        return _finite(np.mean(np.abs(np.asarray(norm(x), np.float64) - exact)) / rounding)

    return ratio(nnx), ratio(normjax.nnx)


def half_precision_gradient():
    """LayerNorm, bfloat16, cotangent of mean 100: gradient error over that of rounding once."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    draw = np.random.default_rng(0)
    x, g = (jnp.asarray(m + draw.standard_normal((64, 256)), jnp.bfloat16) for m in (0, 100))
    wide, slope = (np.asarray(a, np.float64) for a in (x, g))
    centred = wide - wide.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    z = centred * inverse
    mean = lambda a: a.mean(-1, keepdims=True)
    exact = inverse * (slope - mean(slope) - z * mean(slope * z))
    rms = lambda a: np.sqrt(np.mean(a**2))
    rounding = rms(exact.astype(x.dtype).astype(np.float64) - exact)

    def ratio(library):
        norm = library.LayerNorm()
        variables = norm.init(jax.random.key(0), x)
        y, pullback = jax.vjp(lambda x: norm.apply(variables, x), x)
        (dx,) = pullback(g.astype(y.dtype))
        return _finite(rms(np.asarray(dx, np.float64) - exact) / rounding)

    return _both(ratio)


def half_precision_output():
    """BatchNorm, bfloat16 in: dtype out."""
    import jax.numpy as jnp

    def dtype(library):
        return str(_train(library.BatchNorm(), jnp.ones((16, 4), jnp.bfloat16))[0].dtype)

    return _both(dtype)


def _kept(kind, dtype):
    import jax
    import numpy as np

    def bytes_per_byte(library):
        norm = getattr(library, kind)(
            **({"use_running_average": False} if kind == "BatchNorm" else {})
        )
        x = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
        x = jax.numpy.asarray(x, dtype)
        variables = norm.init(jax.random.key(0), x)

        def output(x):
            return norm.apply(variables, x, mutable=["batch_stats"])[0]

        _, pullback = jax.jit(lambda x: jax.vjp(output, x))(x)
        return sum(a.nbytes for a in jax.tree.leaves(pullback)) / x.nbytes

    return _both(bytes_per_byte)


def kept_batch_norm():
    """BatchNorm, bfloat16, kept for the backward pass: bytes per byte of input."""
    return _kept("BatchNorm", "bfloat16")


def kept_layer_norm():
    """LayerNorm, bfloat16, kept for the backward pass: bytes per byte of input."""
    return _kept("LayerNorm", "bfloat16")


MEASUREMENTS = (
    offset_variance,
    offset_layer_norm,
    ragged_devices,
    empty_device,
    nan_padding,
    empty_mask,
    bad_batch,
    group_mask,
    explicit_groups,
    half_precision_evaluation,
    half_precision_gradient,
    half_precision_output,
    kept_batch_norm,
    kept_layer_norm,
)


if __name__ == "__main__":
    sys.exit(main())
