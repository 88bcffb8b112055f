"""Compiles in a process of its own, for a compiler is chosen before JAX is imported."""

import multiprocessing
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from benchmarks import machine
from benchmarks.compilers import targets
from benchmarks.compilers.targets import Target

SECTIONS = ("layers", "networks", "memory", "weights", "pods")


def messages(target: Target, options: Namespace) -> Iterator[tuple[Any, ...]]:
    """What a process says that compiles the sections `options.only` for `target`.

    That is ("section", name, heading, number of rows), then for each row ("case", words) and
    ("row", row).

    Raises:
      ValueError: if the compiler does not know the target.
      RuntimeError: if the process ends before it is done.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, target, options), daemon=True)
    process.start()
    sender.close()
    try:
        while (message := receiver.recv()) is not None:
            if isinstance(message, ValueError):
                raise message
            yield message
    except EOFError:
        raise RuntimeError(f"the process that compiles for {target.name} ended") from None
    finally:
        process.kill()
        process.join()


def _serve(pipe, target, options):
    targets.prepare()
    from benchmarks.bandwidth import attempt
    from benchmarks.compilers import layers, memory, networks, pods, weights

    try:
        compiler = targets.Compiler(target, options.dump)
        jobs = {
            "layers": lambda: layers.jobs(compiler, options.methods, options.dtypes),
            "networks": lambda: networks.jobs(compiler, options.networks),
            "memory": lambda: memory.jobs(compiler, options.stacks),
            "weights": lambda: weights.jobs(compiler),
            "pods": lambda: pods.jobs(compiler),
        }
        for name in options.only:
            todo = list(jobs[name]())
            heading = machine.heading("compilers", "flax", *target.packages)
            del heading["machine"]  # of which nothing depends
            pipe.send(("section", name, heading, len(todo)))
            for case, run in todo:
                words = " ".join(map(str, case.values()))
                pipe.send(("case", words))
                pipe.send(("row", attempt(case, run)))
        pipe.send(None)
    except ValueError as error:
        pipe.send(error)
