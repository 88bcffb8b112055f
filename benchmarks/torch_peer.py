"""A process that times PyTorch's normalizations one step at a time, when it is told to."""

import importlib.util
import multiprocessing
import time
from typing import Any

REST = 0.025  # seconds


class Peer:
    """Starts the process; with no torch installed there is none and `available` is False.

    PyTorch gets a process of its own, which rests while others are timed: its idle threads would
    otherwise slow down whoever shares the process.
    """

    def __init__(self, *, gpu: bool):
        self.available = importlib.util.find_spec("torch") is not None
        if self.available:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, gpu), daemon=True)
            self._process.start()
            self.version = self._pipe.recv()

    def prepare(self, method: str, shape: tuple[int, ...], dtype: str) -> bool:
        """Makes a training step; False if PyTorch has no such method for the shape."""
        if not self.available:
            return False
        self._pipe.send((method, shape, dtype))
        return self._pipe.recv()

    def step(self, repeats: int) -> float:
        """Seconds per training step, the mean over `repeats` steps in a row.

        It returns once PyTorch's threads have stopped spinning for work.
        """
        self._pipe.send(repeats)
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
    step: Any = None
    while (message := pipe.recv()) is not None:
        if isinstance(message, tuple):
            step = _training_step(torch, device, *message)
            pipe.send(step is not None)
            continue
        start = time.perf_counter()
        for _ in range(message):
            step()
        if gpu:
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - start) / message)


def _training_step(torch, device, method, shape, dtype):
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
    x, g = (torch.randn(shape, device=device).to(kind) for _ in range(2))
    if method not in ("LayerNorm", "RMSNorm") and four:
        x, g = (a.permute(0, 3, 1, 2) for a in (x, g))
    if method in ("LayerNorm", "RMSNorm"):
        norm = norm.to(kind)
    x.requires_grad_()

    def step():
        x.grad = None
        norm.zero_grad()
        norm(x).backward(g)

    step()
    return step
