"""Derivatives without an oracle: J and its transpose are adjoint, and J is the slope."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from normjax.core.compat import evaluate
from normjax.testing.measure import EXACT, jit
from normjax.testing.subject import Subject, fill

CALLED = {"jaxpr", "call_jaxpr", "fun_jaxpr"}  # parameters with what is called once as it is
STEP = 1e-5  # of the central difference: half the digits of float64, and its square of the others


def derivative_gaps(function: Callable, *point: Any, seed: int = 0) -> tuple[float, float]:
    """How far the Jacobian J of `function` at `point` is from its transpose, and from the slope.

    First the difference of `<v, J u>` and `<J' v, u>`, relative to the larger, for random u and v;
    then that of `J u` and the central difference along u, relative to this. What goes through
    `lax.stop_gradient` is constant in the difference, as it is for J. Use it in float64, where they
    are about 1e-15 and 1e-9 to 1e-7. ValueError for a `stop_gradient` inside of a loop or `cond`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> function = lambda x: jnp.sin(x) * jax.lax.stop_gradient(x)
      >>> with jax.enable_x64(True):
      ...     adjoint, slope = derivative_gaps(function, jnp.arange(3.0))
      >>> adjoint < 1e-12, slope < 1e-7
      (True, True)
    """
    u, v = _directions(function, point, seed)
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(np.vdot, a, b)))

    def everything(point, u, v):
        moved = jax.jvp(function, point, u)[1]
        return moved, jax.vjp(function, *point)[1](v), _difference(function, point, u)

    moved, pulled, slope = jit(everything)(point, u, v)
    forward, reverse = dot(v, moved), dot(pulled, u)
    adjoint = float(abs(forward - reverse) / max(abs(forward), abs(reverse), 1))
    size = lambda a: np.max(np.abs(a), initial=0)
    gaps = [
        size(a - b) / max(size(b), 1) for a, b in zip(slope, jax.tree.leaves(moved), strict=True)
    ]
    return adjoint, float(np.nan_to_num(size(gaps), nan=np.inf))


def _difference(function, point, u):
    """The central difference along `u`, as leaves; what is stopped stays as at `point`."""
    leaves, tree = jax.tree.flatten(point)
    flat = lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))
    program = jax.make_jaxpr(flat)(*leaves)
    stopped = []
    if any(map(_stops, program.eqns)):
        _walk(program, leaves, lambda a: stopped.append(a) or a)

    def end(step):
        moved = [a + step * b for a, b in zip(leaves, jax.tree.leaves(u), strict=True)]
        held = iter(stopped)
        return _walk(program, moved, lambda _: next(held))

    ends = lax.map(end, jnp.array([STEP, -STEP]))
    return [(a[0] - a[1]) / (2 * STEP) for a in ends]


def _directions(function, point, seed):
    """Random tangents of `point` and cotangents of what `function` makes of it."""
    rng = np.random.default_rng(seed)
    random = lambda tree: jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), tree)
    return random(point), random(jax.eval_shape(function, *point))


def _walk(program, args, visit):
    """Evaluates `program` with `visit(value)` in place of every `stop_gradient`."""
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
    for eqn in jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "stop_gradient":
            out = [visit(*given)]
        elif not _stops(eqn):
            out = evaluate(eqn.primitive, eqn.params, *given)
        elif eqn.primitive.name != "scan" and (names := CALLED & eqn.params.keys()):
            out = _walk(eqn.params[names.pop()], given, visit)
        else:
            raise ValueError(
                f"derivative_gaps: a stop_gradient inside of a {eqn.primitive}, whose value cannot "
                "be held for the difference: stop gradients outside of loops."
            )
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _stops(eqn):
    """Whether there is a `stop_gradient` inside of an equation."""
    inner = (each for jaxpr in core.jaxprs_in_params(eqn.params) for each in jaxpr.eqns)
    return eqn.primitive.name == "stop_gradient" or any(map(_stops, inner))


def check(subject: Subject) -> None:
    """Adjoint and slope of output and new state, without a mask, and with one and NaN outside.

    The new state is a constant of parameters and input: no gradient flows through it.
    """
    with jax.enable_x64(True):
        for output, params, state, x in _ways(subject):
            _check("apply", output, params, state, x)
        moved = lambda params, x: output(params, state, x)[1]
        u, _ = _directions(moved, (params, x), seed=1)
        for a in jax.tree.leaves(jit(lambda *at: jax.jvp(moved, at, u)[1])(params, x)):
            assert not np.any(a), "gradients flow through the new state: it lacks a stop_gradient"


def check_second(subject: Subject) -> None:
    """The same of the gradient of a loss, which is what further derivatives are made of."""
    with jax.enable_x64(True):
        weight = subject.inputs(jnp.float64, seed=8)
        for output, *point in _ways(subject):
            loss = lambda *point, y=output: jnp.sum(jnp.sin(y(*point)[0]) * weight)
            _check("its gradient", jax.grad(loss, (0, 2)), *point)


def _ways(subject):
    """The output, masked and not, with its point."""
    variables, x = subject.variables(jnp.float64), subject.inputs(jnp.float64)
    for mask in subject.masks():

        def output(params, state, x, mask=mask):
            y, new = subject.apply(params, state, x, mask)
            return fill(mask, y, 0), new

        yield output, *variables, fill(mask, x, jnp.nan)


def _check(name, function, *point):
    adjoint, slope = derivative_gaps(function, *point)
    assert adjoint <= 1e-11, f"{name}: J and its transpose differ by {adjoint:.2g}"
    assert slope <= 1e-6, f"{name}: J and the slope differ by {slope:.2g}"


def check_transforms(subject: Subject) -> None:
    """Ensembles by vmap and steps by scan give the state, output and gradient of calls alone."""
    with jax.enable_x64(True):
        params, state = subject.variables(jnp.float64)
        batches = jnp.stack([subject.inputs(jnp.float64, seed) for seed in (2, 3, 4)])

        def call(params, state, x):
            y, new = subject.apply(params, state, x)
            return jnp.sum(jnp.sin(y)), (y, new)

        step = jit(jax.value_and_grad(call, (0, 2), has_aux=True))
        carry, outputs = state, []
        for x in batches:
            (_, (y, carry)), _ = step(params, carry, x)
            outputs.append(y)
        scanned = jit(lambda s, xs: lax.scan(lambda s, x: subject.apply(params, s, x)[::-1], s, xs))
        chex.assert_trees_all_close(scanned(state, batches), (carry, jnp.stack(outputs)), **EXACT)

        copies = jax.tree.map(lambda a: jnp.stack([a, 2 * a, a + 1]), (params, state))
        together = jit(jax.vmap(jax.value_and_grad(call, (0, 2), has_aux=True)))(*copies, batches)
        for i in range(3):
            pick = lambda tree, i=i: jax.tree.map(lambda a: a[i], tree)
            chex.assert_trees_all_close(pick(together), step(*pick(copies), batches[i]), **EXACT)
