"""Single layers: the forward pass, the same with what reverse mode keeps, the backward pass, both.

Forward and backward passes of their own are those of `benchmarks.split`: what the forward pass
keeps and is the input, or a view of it, is not returned, for as an output it would be a copy.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import inputs, speed
from benchmarks.compilers.targets import Compiler, placed
from benchmarks.split import Passes

PASSES = ("forward", "residuals", "backward", "both")
# The last shape of a method in bfloat16 is more than a TPU holds on the chip.
MAPS = ((256, 56, 56, 64), (256, 28, 28, 256), (512, 28, 28, 256))
ROWS = ((131072, 128), (64, 512, 768), (16384, 4096))
GROUPS = ((64, 32, 32, 256), (256, 32, 32, 256))
CASES = {
    "BatchNorm": MAPS,
    "BatchNorm, relu": MAPS,
    "LayerNorm": ROWS,
    "RMSNorm": ROWS,
    "GroupNorm": GROUPS,
    "InstanceNorm": GROUPS,
    "Ghost, 4 groups": MAPS[-1:],
    "GhostBatchNorm": MAPS[-1:],
    "ExclusiveBatchNorm": MAPS[-1:],
    "GhostNoiseBatchNorm": MAPS[-1:],
    "BatchNorm, GhostNoise, Affine": MAPS[-1:],
    "SpectralBatchNorm": MAPS[-1:],
    "SpectralBatchNorm, half": MAPS[-1:],
    "LayerNorm, residual": ROWS[-1:],
    "RMSNorm, residual": ROWS[-1:],
}
DTYPES = ("bfloat16", "float32")
SINGLE = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")


def bound(method: str) -> dict[str, int]:
    """How often an input must be read or written in each of `PASSES`, at least.

    Where the values of one statistic fit on the chip, x is read once, and y or dx written. Where
    they cross samples, x is read for the statistics, and x and the cotangent for their sums, first.
    One program that knows the cotangent takes all sums in one read, then writes y and dx. A norm of
    the sum of x and a residual reads both and writes the sum too.

    Example:
      >>> bound("BatchNorm")
      {'forward': 3, 'residuals': 3, 'backward': 5, 'both': 6}
    """
    least = (2, 2, 3, 4) if method in SINGLE else (3, 3, 5, 6)
    least = (4, 4, 3, 6) if method.endswith("residual") else least
    return dict(zip(PASSES, least, strict=True))


def jobs(
    compiler: Compiler, methods: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What is to be compiled, each with a function that does it."""
    for method in methods:
        for shape in CASES[method]:
            for dtype in dtypes:
                case = {"method": method, "shape": list(shape), "dtype": dtype}
                yield case, functools.partial(measure, compiler, method, shape, dtype)


def measure(compiler: Compiler, method: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """The figures of each peer and pass, with the bytes of the input and of what is kept."""
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=compiler.one)
    label = f"{method} {'x'.join(map(str, shape))} {dtype}"
    found: dict[str, Any] = {
        "input": math.prod(shape) * x.dtype.itemsize,
        "bound": bound(method),
        "programs": {},
    }
    for peer, (params, rest, apply) in arms(method, shape, dtype).items():
        params, rest = placed((params, rest), compiler.one)
        passes = Passes(params, rest, apply, [x], [x])

        def both(params, rest, x, g, apply=apply):
            y, pullback, new = jax.vjp(lambda p, x: apply(p, rest, x), params, x, has_aux=True)
            return y, new, pullback(g)

        lowered = {
            "forward": jax.jit(apply).lower(params, rest, x),
            "residuals": passes.lowered["forward"],
            "backward": passes.lowered["backward"],
            "both": jax.jit(both).lower(params, rest, x, x),
        }
        found["programs"][peer] = {
            "kept": passes.kept,
            **{name: compiler.figures(lowered[name], f"{label} {peer} {name}") for name in PASSES},
        }
    return found


def arms(method: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Parameters, what else there is, and `apply(params, rest, x) -> (y, new)` of each peer."""
    if method in inputs.CASES:
        found = inputs.programs(method, shape, dtype)
        every = lambda run: lambda variables, _, x: run(variables, x, None)
        return {name: (variables, (), every(run)) for name, (variables, run) in found.items()}
    programs = speed.programs(method, shape[1:-1], shape[-1], jnp.dtype(dtype))
    variables, flax = programs["flax"]
    others = {name: tree for name, tree in variables.items() if name != "params"}
    (params, state), ours = programs["normjax"]
    return {
        "flax": (
            variables["params"],
            others,
            lambda p, rest, x: flax({"params": p, **rest}, x, None),
        ),
        "normjax": (
            params,
            (state, jax.random.key(0)),
            lambda p, rest, x: ours((p, rest[0]), x, rest[1]),
        ),
    }
