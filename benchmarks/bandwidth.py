"""Forward and backward passes of norms as shares of what a copy moves, for `benchmarks.device`.

Small inputs come several at a time, one after another in one program: together they are larger
than any cache, and starting the program is no part of the time.
"""

import contextlib
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import speed
from benchmarks.budget import Budget
from benchmarks.split import DIRECTIONS, Passes, kernels
from benchmarks.torch_peer import Peer

ROWS = ((16384, 4096), (8192, 8192), (131072, 128))
MAPS = ((32, 56, 56, 256), (128, 28, 28, 512), (256, 14, 14, 1024))
SHAPES = {
    "LayerNorm": ROWS,
    "BatchNorm": MAPS,
    "RMSNorm": ROWS,
    "GroupNorm": MAPS,
    "SpectralBatchNorm": MAPS,
    "GhostNoiseBatchNorm": MAPS,
}
TINY = {ROWS: ((256, 64),), MAPS: ((16, 4, 4, 32),)}
# Passes over the input, forward and backward, that nothing goes below: rows fit on chip, batches
# are read for their statistics first.
IDEAL = {"LayerNorm": (2, 3), "RMSNorm": (2, 3)}
COPY_BYTES = 2**30
CACHE_BYTES = 2**28  # more than any cache holds

Arm = tuple[Any, Any, Callable]


def rows(
    methods: Sequence[str], dtypes: Sequence[str], tiny: bool, rounds: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """A row for the copy, then one for each method, shape and dtype.

    Args:
      methods: names of methods; those of `SHAPES` count.
      dtypes: names of dtypes, the most important first.
      tiny: small shapes, for a try.
      rounds: how many turns everyone takes.
      budget: time for all.
    """
    turn = 0.001 if tiny else 0.01
    todo = []
    for dtype in dtypes:
        for place in range(1 if tiny else len(ROWS)):
            for method in SHAPES:
                if method in methods:
                    shape = (TINY[SHAPES[method]] if tiny else SHAPES[method])[place]
                    todo.append((method, shape, dtype))
    copied, peer = None, None
    if not budget.skip("bandwidth: copy"):
        row: dict[str, Any] = {"part": "bandwidth", "method": "copy"}
        size = COPY_BYTES >> 12 if tiny else COPY_BYTES
        yield attempt(row, lambda: copy(size, rounds, turn))
        copied = row.get("gb_s")
    try:
        for method, shape, dtype in todo:
            if budget.skip(f"bandwidth: {method} {'x'.join(map(str, shape))} {dtype}"):
                continue
            peer = peer or Torch()
            row = {"part": "bandwidth", "method": method, "shape": list(shape), "dtype": dtype}
            one = functools.partial(measure, method, shape, dtype, peer, rounds, turn, copied)
            yield attempt(row, one)
    finally:
        if peer is not None:
            peer.close()


def attempt(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`row` with what `run` returns, or with a `note` of what it complains about."""
    try:
        row.update(run())
    except Exception as error:
        row["note"] = complaint(error)
    return row


def complaint(error: Exception) -> str:
    """The first line of what went wrong."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]


class Torch:
    """The process with PyTorch, where that is installed; `note` is what went wrong last."""

    def __init__(self):
        self.note: str | None = None
        self._peer: Peer | None = None
        try:
            self._peer = Peer(gpu=jax.default_backend() != "cpu")
        except EOFError:
            self.note = "the process does not start"

    def turns(self, method: str, shape: tuple[int, ...], dtype: str, copies: int) -> dict[str, Any]:
        """Its two passes, as `interleaved` takes them; none if it has no such method."""
        peer = self._peer
        if peer is None:
            return {}
        calls = {
            name: lambda repeats, name=name, peer=peer: peer.step(repeats * copies, name) * copies
            for name in DIRECTIONS
        }
        try:
            if not peer.prepare(method, shape, dtype, copies):
                self.note = peer.refused
                return {}
            for call in calls.values():
                call(1)
        except (EOFError, OSError):
            self._peer, self.note = None, f"the process ended at {method} {shape} {dtype}"
            return {}
        self.note = None
        return calls

    def close(self) -> None:
        """Ends the process."""
        if self._peer is not None:
            with contextlib.suppress(OSError):
                self._peer.close()


def copy(size: int, rounds: int, turn: float) -> dict[str, Any]:
    """What a program that reads and negates an array of `size` bytes moves, and what a call takes.

    Returns:
      `gb_s` with quartiles, bytes read plus bytes written, and `call_us`, the time of a program
      that has nothing to do.
    """
    large, small = jax.random.normal(jax.random.key(0), (size // 4,)), jnp.ones(8)
    negate = jax.jit(jnp.negative)
    calls = {"copy": timed(negate, large), "call": timed(negate, small)}
    times = interleaved(calls, rounds, turn)
    rates = np.quantile(2e-9 * large.nbytes / times["copy"], (0.5, 0.25, 0.75))
    return {
        "bytes": large.nbytes,
        **dict(zip(("gb_s", "gb_s_low", "gb_s_high"), map(float, rates), strict=True)),
        "call_us": float(np.median(times["call"]) * 1e6),
    }


def measure(
    method: str,
    shape: tuple[int, ...],
    dtype: str,
    torch: Torch,
    rounds: int,
    turn: float,
    bandwidth: float | None,
) -> dict[str, Any]:
    """Both passes of normjax and its peers, who take turns.

    Args:
      method: a key of `SHAPES`.
      shape: shape of the input.
      dtype: its dtype.
      torch: the process with PyTorch.
      rounds: how many turns everyone takes.
      turn: seconds of a turn.
      bandwidth: of a copy, in GB/s; None: not known.

    Returns:
      By program and direction: `ms` with quartiles, `gb_s` and `share` of the bandwidth for the
      `passes` that nothing goes below, `kernels`, and `bytes` accessed by byte of input; by program
      what is `kept` by byte of input, or a `note` on what failed.
    """
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    copies = 1 if size >= CACHE_BYTES else min(-(-CACHE_BYTES // size), 8)
    draw = jax.jit(lambda key: jax.random.normal(key, shape).astype(dtype))
    x, g = (tuple(draw(jax.random.key(2 * i + j)) for i in range(copies)) for j in (0, 1))
    found, calls = _programs(_arms(method, shape), x, g, size)
    calls |= {("torch", d): call for d, call in torch.turns(method, shape, dtype, copies).items()}
    if torch.note:
        found["torch"] = {"note": torch.note}
    ideal = IDEAL.get(method, (3, 5))
    for (name, direction), times in interleaved(calls, rounds, turn).items():
        median, low, high = (float(t) for t in np.quantile(times / copies, (0.5, 0.25, 0.75)))
        rate = size * ideal[DIRECTIONS.index(direction)] / median / 1e9
        found.setdefault(name, {}).setdefault(direction, {}).update(
            ms=median * 1e3,
            ms_low=low * 1e3,
            ms_high=high * 1e3,
            gb_s=rate,
            share=None if bandwidth is None else rate / bandwidth,
        )
    return {"copies": copies, "passes": list(ideal), "programs": found}


def _programs(
    arms: Iterable[tuple[str, Arm]], x: Sequence[jax.Array], g: Sequence[jax.Array], size: int
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], Callable]]:
    """What there is to say about the programs of each arm, and calls of them by name, direction."""
    found, ready, started, calls = {}, {}, {}, {}

    def lower(name, arm: Arm):
        ready[name] = Passes(*arm, x=x, g=g)
        return {"kept": ready[name].kept / size}

    def finish(name):
        compiled = {direction: program.result() for direction, program in started[name].items()}
        arguments = ready[name].arguments(compiled["forward"])
        made = {(name, d): timed(program, *arguments[d]) for d, program in compiled.items()}
        for call in made.values():
            call(1)
        calls.update(made)
        return {d: _static(program, size, len(x)) for d, program in compiled.items()}

    for name, arm in arms:
        found[name] = attempt({}, functools.partial(lower, name, arm))
    with ThreadPoolExecutor() as pool:
        for name, passes in ready.items():
            started[name] = {d: pool.submit(low.compile) for d, low in passes.lowered.items()}
    for name in ready:
        attempt(found[name], functools.partial(finish, name))
    return found, calls


def timed(program: Callable, *args: Any) -> Callable[[int], float]:
    """Seconds for each of several calls in a row, of which only the last is waited for."""

    def call(repeats):
        out = None
        start = time.perf_counter()
        for _ in range(repeats):
            out = program(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / repeats

    return call


def interleaved(calls: dict[Any, Callable], rounds: int, turn: float) -> dict[Any, np.ndarray]:
    """Seconds of each of `calls`, which take `rounds` turns of about `turn` seconds each."""
    repeats = {}
    for name, call in calls.items():
        call(1)
        repeats[name] = max(1, min(200, round(turn / max(call(2), 1e-7))))
    times = {name: np.zeros(rounds) for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            times[name][i] = call(repeats[name])
    return times


def _arms(method: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Arm]]:
    """Name, and parameters, what else there is, and `apply(params, rest, x) -> (y, new)`."""
    key = jax.random.key(2)
    for name, (variables, apply) in speed.programs(method, shape[1:-1], shape[-1]).items():
        if name == "normjax":
            ours = lambda p, rest, x, apply=apply: apply((p, rest[0]), x, rest[1])
            yield name, (variables[0], (variables[1], key), ours)
        elif name == "flax":
            rest = {k: v for k, v in variables.items() if k != "params"}
            theirs = lambda p, rest, x, apply=apply: apply({"params": p, **rest}, x, None)
            yield name, (variables["params"], rest, theirs)
        elif name == "plain_fft":
            yield "plain", (variables, (), lambda p, _, x, apply=apply: apply(p, x, None))
    ones = jnp.ones(shape[-1])
    if method in ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"):
        params = (ones, 0 * ones)[: 1 if method == "RMSNorm" else 2]
        yield "plain", (params, (), lambda p, _, x: _plain(method, p, x))
    if method in ("LayerNorm", "RMSNorm") and importlib.util.find_spec("tokamax"):
        params = (ones, None if method == "RMSNorm" else 0 * ones)
        yield "tokamax", (params, (), lambda p, _, x: _tokamax(method, p, x))


def _plain(method, params, x):
    """The formula as it reads, with the variance from a second pass."""
    wide = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1)) if method == "BatchNorm" else (-1,)
    if method == "GroupNorm":
        wide = wide.reshape(*x.shape[:-1], 32, -1)
        axes = (*range(1, x.ndim - 1), -1)
    mean = 0.0 if method == "RMSNorm" else wide.mean(axes, keepdims=True)
    var = jnp.square(wide - mean).mean(axes, keepdims=True)
    epsilon = 1e-5 if method == "BatchNorm" else 1e-6
    y = ((wide - mean) * lax.rsqrt(var + epsilon)).reshape(x.shape)
    scale, *bias = (a.reshape((1,) * (x.ndim - 1) + a.shape) for a in params)
    y = y * scale + (bias[0] if bias else 0)
    return y.astype(x.dtype), lax.stop_gradient((mean, var)) if method == "BatchNorm" else ()


def _tokamax(method, params, x):
    import tokamax  # pyright: ignore[reportMissingImports]

    centred = method == "LayerNorm"
    return tokamax.layer_norm(x, *params, epsilon=1e-6, subtract_mean=centred), ()


def _static(program, size, copies):
    """Kernels, and bytes accessed by byte of input, of a program that runs `copies` times."""
    accessed = (program.cost_analysis() or {}).get("bytes accessed")
    return {
        "kernels": kernels(program.as_text() or "") / copies,
        "bytes": None if accessed is None else accessed / copies / size,
    }
