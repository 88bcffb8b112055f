"""Half precision rounds once, both ways; offsets are harmless; constants have derivatives."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from normjax.methods.chain import Chain
from normjax.testing.measure import jit
from normjax.testing.subject import Subject

HALF = (jnp.bfloat16, jnp.float16)


def check(subject: Subject) -> None:
    """Outputs in half precision and at offsets against float64; finite derivatives of constants."""
    params, state = subject.variables()
    run, exactly = (f(lambda *a: subject.apply(*a)[0]) for f in (jit, in_float64))
    for dtype in HALF:
        args = params, state, subject.inputs(dtype)
        y, exact = run(*args), exactly(*args)
        error = _rms(np.asarray(y, np.float64) - exact)
        allowed = 1.2 * np.sqrt(subject.roundings) * _rms(_rounded(exact, y.dtype) - exact)
        _check_error(error, allowed, jnp.dtype(dtype))
    for offset in (0.0, 1e2, 1e4):
        args = params, state, subject.inputs() + np.float32(offset)
        y, exact = run(*args), exactly(*args)
        error = np.max(np.abs(np.asarray(y, np.float64) - exact)) / max(np.max(np.abs(exact)), 1)
        _check_error(error, 2e-6 + 2e-7 * offset, f"offset {offset:g}, relative")

    loss = lambda x: jnp.sum(subject.apply(params, state, x)[0] ** 2)
    derivatives = jit(lambda x, dx: jax.jvp(jax.grad(loss), (x,), (dx,)))
    for value in (0, 3):
        x = jnp.full(subject.shape, value, jnp.float32)
        chex.assert_tree_all_finite(derivatives(x, subject.inputs()))


def check_gradients(subject: Subject) -> None:
    """Gradients in half precision are as good as exact ones rounded once, whatever comes in.

    For cotangents with large means, the gradients of norms are small differences of large numbers.
    The measure for a chain is the exact gradient of one that rounds between its methods.
    """
    params, state = subject.variables()

    def pulled(method, params, state, x, g):
        run = lambda p, x: subject.apply(p, state, x, method=method)[0]
        y, pullback = jax.vjp(run, params, x)
        return pullback(g.astype(y.dtype))

    run, exactly = (f(functools.partial(pulled, subject.method)) for f in (jit, in_float64))
    noise = np.random.default_rng(9).normal(size=subject.shape)
    for dtype in HALF:
        links = _rounding_links(subject.method, dtype)
        best = exactly if links is None else in_float64(functools.partial(pulled, links))
        x = subject.inputs(dtype)
        for mean in (0, 1, 10, 100):
            args = params, state, x, jnp.asarray(mean + noise, dtype)
            found = (jax.tree.leaves(f(*args)) for f in (run, exactly, best))
            for got, exact, rounded in zip(*found, strict=True):
                rounded = _rounded(rounded, got.dtype)
                finite = np.isfinite(rounded)
                error = _rms((np.asarray(got, np.float64) - exact)[finite])
                allowed = 1.3 * _rms((rounded - exact)[finite])
                if got.dtype.itemsize >= 4:  # of parameters: float32 sums over so many terms
                    allowed += 3e-7 * (1 + mean) * x.size / max(got.size, 1)
                    allowed += subject.keeps_rounded * jnp.finfo(dtype).eps * _rms(exact)
                _check_error(error, allowed, f"{jnp.dtype(dtype)}, cotangent of mean {mean}")


def _check_error(error, allowed, what):
    assert error <= allowed, f"{what}: error {error:.3g}, {allowed:.3g} allowed"


def _rounding_links(method, dtype):
    """The chain `method` with rounding to `dtype` between its links; None: it is no chain."""
    if not isinstance(method, Chain):
        return None
    *links, last = method.methods
    rounding = (_rounding(link, dtype) for link in links)
    return dataclasses.replace(method, methods=(*rounding, last))


def _rounding(link, dtype):
    """The method `link` with its output, and so the cotangent of that, rounded."""

    def apply(self, *args, **how):
        y, state = link.apply(*args, **how)
        return y.astype(dtype).astype(y.dtype), state

    kind = type(type(link).__name__, (type(link),), {"apply": apply})
    return kind(**{f.name: getattr(link, f.name) for f in dataclasses.fields(link)})


def in_float64(function):
    """`function` of the same arrays in float64."""
    run = jit(function)

    def exactly(*args):
        with jax.enable_x64(True):
            args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), args)
            return jax.tree.map(np.asarray, run(*args))

    return exactly


def _rounded(exact, dtype):
    return exact.astype(dtype).astype(np.float64)


def _rms(a):
    return np.sqrt(np.mean(np.square(a))) if a.size else 0.0
