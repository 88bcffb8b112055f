"""Training steps of ResNet-50 with flax.linen's and normjax's batch norms, for `benchmarks.device`.

Every network lives in a process of its own, so that peaks of memory do not mix; all are compiled
first, one after another, and then take turns.
"""

import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import normjax.linen
from benchmarks.bandwidth import attempt, complaint
from benchmarks.budget import Budget

ARMS = ("flax", "normjax", "normjax, relu inside")
FULL = {"size": 224, "width": 64, "stages": (3, 4, 6, 3), "classes": 1000, "steps": 5}
TINY = {"size": 16, "width": 4, "stages": (1,), "classes": 10, "steps": 1}
RESERVE = 20.0  # seconds for the turns of networks that are compiled


class ResNet(nn.Module):
    """Residual network of bottleneck blocks, https://arxiv.org/abs/1512.03385, for images.

    The stride of a block is that of its 3x3 convolution; the last scale of a branch starts at 0.
    Parameters and the logits are float32.

    Attributes:
      norm: makes a batch norm from Flax's fields.
      inside: whether `norm` takes the ReLU behind it as its `activation`.
      stages: blocks of each stage.
      width: channels of the first convolution.
      classes: number of classes.
      dtype: of all else.
      remat: makes a block recompute what it does not keep, as `nn.remat`; None: all is kept.
      wrap: makes a wrapper for each layer with a kernel, such as `nn.WeightNorm`; None: without.
    """

    norm: Callable[..., Callable]
    inside: bool = False
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    dtype: Any = jnp.bfloat16
    remat: Callable[[Callable], Callable] | None = None
    wrap: Callable[[nn.Module], nn.Module] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images [N, H, W, C]."""

        wrap = self.wrap or (lambda layer: layer)

        def conv(x, features, size, stride=1):
            kind = {"use_bias": False, "dtype": self.dtype}
            return wrap(nn.Conv(features, (size, size), (stride, stride), **kind))(x)

        def norm(x, relu=True, **how):
            if relu and self.inside:
                return self.norm(use_running_average=not train, activation=nn.relu, **how)(x)
            y = self.norm(use_running_average=not train, **how)(x)
            return nn.relu(y) if relu else y

        def bottleneck(_, x, inner, stride, project):
            y = norm(conv(x, inner, 1))
            y = norm(conv(y, inner, 3, stride))
            y = norm(conv(y, 4 * inner, 1), relu=False, scale_init=nn.initializers.zeros)
            if project:
                x = norm(conv(x, 4 * inner, 1, stride), relu=False)
            return nn.relu(x + y)

        x = norm(conv(x, self.width, 7, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                inner, stride = self.width * 2**stage, 2 if stage and not block else 1
                how = {"inner": inner, "stride": stride, "project": block == 0}
                one = functools.partial(bottleneck, **how)
                x = (one if self.remat is None else self.remat(one))(self, x)
        return wrap(nn.Dense(self.classes, dtype=jnp.float32))(x.mean((1, 2)))


def network(arm: str, **how: Any) -> ResNet:
    """The network of an arm, one of `ARMS`, with the fields `how`."""
    kind = nn.BatchNorm if arm == "flax" else normjax.linen.BatchNorm
    norm = functools.partial(kind, momentum=0.9, dtype=jnp.bfloat16)
    return ResNet(norm, inside=arm.endswith("inside"), **how)


def training_step(model: ResNet) -> Callable:
    """`step(state, images, labels) -> (state, loss)` by SGD with momentum.

    The state is a triple of parameters, a dict of all other collections, and momenta.
    """

    def step(state, images, labels):
        params, statistics, momenta = state

        def loss(params):
            variables = {"params": params, **statistics}
            logits, new = model.apply(variables, images, train=True, mutable=list(statistics))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -chosen.mean(), new

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        momenta = jax.tree.map(lambda m, g: 0.9 * m + g, momenta, gradients)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momenta)
        return (params, statistics, momenta), value

    return step


def rows(batch: int, tiny: bool, rounds: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """The row of `measure`, if there is time."""
    if not budget.skip("network"):
        row: dict[str, Any] = {"part": "network"}
        yield attempt(row, lambda: measure(batch, tiny, rounds, budget))


def measure(batch: int, tiny: bool, rounds: int, budget: Budget) -> dict[str, Any]:
    """Every network's training step, by arm.

    Args:
      batch: number of images.
      tiny: a small network and small images, for a try.
      rounds: how many turns of some steps everyone takes.
      budget: time for all.

    Returns:
      By arm: `ms` of a step with quartiles, `peak_bytes` of the device's memory (None where it
      does not say), how much of that was reached in compiling already (`compiling_bytes`), bytes of
      the program's temporaries and of all that it reads and writes, and the seconds of compiling;
      or a `note` on what failed.
    """
    setting = (TINY if tiny else FULL) | {"batch": batch}
    row: dict[str, Any] = {**setting, "programs": {}}
    found = row["programs"]
    times: dict[str, list[float]] = {}
    running: dict[str, _Process] = {}
    with tempfile.TemporaryDirectory() as cache:
        try:
            for arm in ARMS:
                if budget.left() < (0 if tiny else RESERVE):
                    budget.left_out.append(f"network: {arm}")
                    continue
                process = running[arm] = _Process(arm, setting, None if tiny else cache)
                found[arm] = process.receive(budget.left() - (0 if tiny else RESERVE))
                if "note" in found[arm]:
                    running.pop(arm).end()
                    if found[arm]["note"] == LATE:
                        budget.left_out.append(f"network: {arm}")
            for _ in range(rounds):
                for arm, process in list(running.items()):
                    reply = process.turn()
                    found[arm].update(reply)
                    if "note" in reply:
                        running.pop(arm).end()
                    else:
                        times.setdefault(arm, []).append(found[arm].pop("seconds"))
                if budget.left() == 0:
                    break
        finally:
            for process in running.values():
                process.end()
    for arm, seconds in times.items():
        quantiles = np.quantile(seconds, (0.5, 0.25, 0.75)) * 1e3
        found[arm] |= dict(zip(("ms", "ms_low", "ms_high"), map(float, quantiles), strict=True))
    return row


LATE = "not compiled in time"


class _Process:
    """A process with one network, which waits to be told to run some steps."""

    def __init__(self, arm, setting, cache):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, arm, setting, cache), daemon=True
        )
        self._process.start()
        other.close()

    def receive(self, seconds):
        """What the process says, within `seconds`; a dict with a note if it does not."""
        try:
            return self._pipe.recv() if self._pipe.poll(seconds) else {"note": LATE}
        except (EOFError, OSError):
            return {"note": "the process ended"}

    def turn(self):
        """Runs some steps, and returns what they took."""
        try:
            self._pipe.send("turn")
        except OSError:
            return {"note": "the process ended"}
        return self.receive(120)

    def end(self):
        """Ends the process."""
        self._process.kill()
        self._process.join()


def _serve(pipe, arm, setting, cache):
    try:
        if cache is not None:  # the networks share their convolutions, and which way to take
            jax.config.update("jax_compilation_cache_dir", cache)
        call, about = _prepare(arm, setting)
        pipe.send(about)
        while True:
            pipe.recv()
            pipe.send(call())
    except EOFError:
        return
    except Exception as error:
        pipe.send({"note": complaint(error)})


def _prepare(arm, setting):
    """A function that runs some steps, and what there is to say about the program."""
    model = network(arm, **{key: setting[key] for key in ("stages", "width", "classes")})
    shape = (setting["batch"], setting["size"], setting["size"], 3)
    images = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, setting["classes"])

    @jax.jit
    def initial(key):
        statistics = dict(model.init(key, images[:1], train=False))
        params = statistics.pop("params")
        return params, statistics, jax.tree.map(jnp.zeros_like, params)

    state = initial(jax.random.key(2))
    start = time.perf_counter()
    step = jax.jit(training_step(model), donate_argnums=0)
    compiled = step.lower(state, images, labels).compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    about = {
        "compile_s": seconds,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "accessed_bytes": (compiled.cost_analysis() or {}).get("bytes accessed"),
        "compiling_bytes": _peak(),
    }

    def run(steps):
        nonlocal state
        value = None
        start = time.perf_counter()
        for _ in range(steps):
            state, value = compiled(state, images, labels)
        jax.block_until_ready(value)
        return (time.perf_counter() - start) / steps

    run(2)
    return lambda: {"seconds": run(setting["steps"]), "peak_bytes": _peak()}, about


def _peak():
    """The most bytes that were in use on the device so far; None if it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
