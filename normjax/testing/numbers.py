"""Half precision rounds once, both ways; offsets are harmless; constants have derivatives."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from normjax.testing.measure import jit
from normjax.testing.subject import Subject

HALF = (jnp.bfloat16, jnp.float16)


def check(subject: Subject) -> None:
    """Outputs in half precision and at offsets against float64; finite derivatives of constants."""
    params, state = subject.variables()
    run = jit(subject.apply)
    exactly = in_float64(lambda *a: subject.apply(*a)[0])
    for dtype in HALF:
        x = subject.inputs(dtype)
        y, _ = run(params, state, x)
        exact = exactly(params, state, x)
        error = _rms(np.asarray(y, np.float64) - exact)
        allowed = 1.2 * np.sqrt(subject.roundings) * _rms(_rounded(exact, y.dtype) - exact)
        _check_error(error, allowed, jnp.dtype(dtype))

    for offset in (0.0, 1e2, 1e4):
        x = subject.inputs() + np.float32(offset)
        y, _ = run(params, state, x)
        exact = exactly(params, state, x)
        error = np.max(np.abs(np.asarray(y, np.float64) - exact)) / max(np.max(np.abs(exact)), 1)
        _check_error(error, 2e-6 + 2e-7 * offset, f"offset {offset:g}, relative")

    def loss(x):
        return jnp.sum(subject.apply(params, state, x)[0] ** 2)

    derivatives = jit(lambda x, dx: jax.jvp(jax.grad(loss), (x,), (dx,)))
    for value in (0, 3):
        x = jnp.asarray(np.full(subject.shape, value, np.float32))
        chex.assert_tree_all_finite(derivatives(x, subject.inputs()))


def check_gradients(subject: Subject) -> None:
    """Gradients in half precision are as good as exact ones rounded once, whatever comes in.

    The cotangents have means of 0, 1, 10 and 100: behind a mean, gradients of norms are small
    differences of large numbers. Between the methods of a chain, values and cotangents are of half
    precision: there the measure is the exact gradient of a chain that rounds them and no more.
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
                what = f"{jnp.dtype(dtype)}, cotangent of mean {mean}"
                rounded = _rounded(rounded, got.dtype)
                finite = np.isfinite(rounded)
                found = np.asarray(got, np.float64)
                assert np.all(np.isfinite(found[finite])), f"{what}: not finite"
                error = _rms((found - exact)[finite])
                allowed = 1.3 * _rms((rounded - exact)[finite])
                if got.dtype.itemsize >= 4:  # of parameters: float32 sums over so many terms
                    allowed += 3e-7 * (1 + mean) * x.size / max(got.size, 1)
                    allowed += subject.keeps_rounded * jnp.finfo(dtype).eps * _rms(exact)
                _check_error(error, allowed, what)


def _check_error(error, allowed, what):
    assert error <= allowed, f"{what}: error {error:.3g}, {allowed:.3g} allowed"


def _rounding_links(method, dtype):
    """The chain `method` with rounding to `dtype` between its links; None: it is no chain."""
    method = getattr(method, "chain", method)
    if not hasattr(method, "methods"):
        return None
    *links, last = method.methods
    named = (type(type(link).__name__, (_Rounding,), {})(link, dtype) for link in links)
    return dataclasses.replace(method, methods=(*named, last))


@dataclasses.dataclass(frozen=True)
class _Rounding:
    """A method whose output, and the cotangent of that, are rounded."""

    method: Any
    half: Any

    def init(self, key, features):
        return self.method.init(key, features)

    def apply(self, params, state, x, **how):
        y, state = self.method.apply(params, state, x, **how)
        half = lambda a: a.astype(self.half).astype(a.dtype)
        rounding = jax.custom_vjp(half)
        rounding.defvjp(lambda a: (half(a), None), lambda _, g: (half(g),))
        return rounding(y), state


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
