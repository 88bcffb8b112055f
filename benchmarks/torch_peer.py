"""A process that times PyTorch's normalizations one step at a time, when it is told to."""

import importlib.util
import multiprocessing
import time
from typing import Any

REST = 0.025  # seconds
PASSES = ("step", "forward", "backward")


class Peer:
    """Starts the process; with no torch installed there is none and `available` is False.

    `refused` is what went wrong in the last `prepare`, if anything did.

    PyTorch gets a process of its own, which rests while others are timed: its idle threads would
    otherwise slow down whoever shares the process.
    """

    def __init__(self, *, gpu: bool):
        self.available = importlib.util.find_spec("torch") is not None
        self.refused: str | None = None
        if self.available:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, gpu), daemon=True)
            self._process.start()
            other.close()
            self.version = self._pipe.recv()

    def prepare(self, method: str, shape: tuple[int, ...], dtype: str, copies: int = 1) -> bool:
        """Makes a training step over each of `copies` inputs in turn, and its two passes.

        False if PyTorch has no such method for the shape, or cannot run it.
        """
        if not self.available:
            return False
        self._pipe.send(("prepare", method, shape, dtype, copies))
        made, self.refused = self._pipe.recv()
        return made

    def step(self, repeats: int, passes: str = "step") -> float:
        """Seconds per training step, or its "forward" or "backward" pass alone.

        The mean over `repeats` in a row. It returns once PyTorch's threads have stopped spinning
        for work.
        """
        self._pipe.send((passes, repeats))
        seconds = self._pipe.recv()
        time.sleep(REST)
        return seconds

    def close(self) -> None:
        """Ends the process."""
        if self.available:
            self._pipe.send(None)
            self._process.join()


def _serve(pipe: Any, gpu: bool) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if gpu else "cpu"
    pipe.send(torch.__version__)
    ready: Any = None
    while (message := pipe.recv()) is not None:
        name, *arguments = message
        if name == "prepare":
            ready = refused = None  # the memory of the last one first
            try:
                ready = _training_step(torch, device, *arguments)
            except Exception as error:
                refused = f"{type(error).__name__}: {error}"
            pipe.send((ready is not None, refused))
            continue
        (repeats,) = arguments
        run = ready[name]()
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(repeats):
            run(i)
        if gpu:
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start) / repeats)


def _training_step(torch, device, method, shape, dtype, copies):
    """Functions by name that make `run(i)`, which takes the i-th input; None: no such method."""
    nn = torch.nn
    channels, positions = shape[-1], len(shape) - 2
    four = positions == 2
    makers = {
        "BatchNorm": lambda: nn.BatchNorm2d(channels) if four else nn.BatchNorm1d(channels),
        "LayerNorm": lambda: nn.LayerNorm(channels),
        "RMSNorm": lambda: nn.RMSNorm(channels),
        "GroupNorm": lambda: nn.GroupNorm(32, channels),
        "InstanceNorm": lambda: nn.InstanceNorm2d(channels, affine=True),
    }
    if method not in makers or (method == "BatchNorm" and positions not in (0, 2)):
        return None
    norm = makers[method]().to(device)
    kind = getattr(torch, dtype)
    if method in ("LayerNorm", "RMSNorm"):
        norm = norm.to(kind)
    pairs = []
    for _ in range(copies):
        x, g = (torch.randn(shape, device=device).to(kind) for _ in range(2))
        if method not in ("LayerNorm", "RMSNorm") and four:
            x, g = (a.permute(0, 3, 1, 2) for a in (x, g))
        pairs.append((x.requires_grad_(), g))

    def step(i):
        x, g = pairs[i % copies]
        x.grad = None
        norm.zero_grad()
        norm(x).backward(g)

    def backward():
        kept = [norm(x) for x, _ in pairs]

        def run(i):
            x, g = pairs[i % copies]
            at = [x, *norm.parameters()]
            torch.autograd.grad(kept[i % copies], at, g, retain_graph=True)

        return run

    try:
        step(0)
    except RuntimeError:  # a kernel that takes no parameters of another dtype
        norm.to(kind)
        step(0)
    forward = lambda i: norm(pairs[i % copies][0])
    return dict(zip(PASSES, (lambda: step, lambda: forward, backward), strict=True))
