"""Every pass over an activation: all kinds of derivatives, once for each pass, not per method.

The oracle is plain autodiff of the same formula; `test_the_switch_is_plain` shows that it is.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from normjax.core import matrices, passes
from normjax.core.compat import plain_derivatives
from normjax.core.linear import Input, differentiated
from normjax.core.method import Normalizer
from normjax.core.segments import Segments
from normjax.methods.spectral import spatial, transforms
from normjax.testing import derivative_gaps

EXACT = dict(rtol=1e-10, atol=1e-10)
SHAPE = (4, 3, 4, 2)
IDS = np.random.default_rng(2).integers(0, 4, (4, 3, 4, 1)).astype(np.int32)  # 3: in none
MASK = np.random.default_rng(0).random(SHAPE) < 0.7
SAMPLES = np.array([1, 0, 1, 1], bool).reshape(4, 1, 1, 1)
LAYOUT = transforms.Layout(SHAPE, (0,), (1, 2), (3,))
ODD = transforms.Layout((4, 2, 3, 2), (0,), (1, 2), (3,))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def moments(x, **how):
    return passes.moments(x, (0, 1, 2), **how)[1:]


def of_segments(x, axis=0, weights=None, **how):
    return passes.moments(x, (0, 1, 2), mask=Segments(IDS, weights, 3, axis), **how)[1:]


def segments_affine(activation, x, *small):
    how = dict(activation=activation, segments=Segments(IDS, None, 3, 1))
    return passes.affine(x, *small, **how)


def rows(activation, x, inverse, scale, bias, mean=None):
    return passes._rows(passes.carried(x), mean, inverse, scale, bias, activation, x.dtype)


def gated(activation, of_gate, x, gate, *along):
    normalizer = Normalizer(along[3] if len(along) > 3 else None, *along[:3])
    return passes.apply(x, normalizer, activation=activation, gate=(gate, of_gate))


def affine(activation, x, *small):
    return passes.affine(x, *small, activation=activation)


def spatial_moments(half, mask, x):
    x, mask = passes.inputs("spatial moments", x, mask)
    return spatial.moments(x, LAYOUT, half=half, mask=mask)[1:]


def spatial_affine(half, activation, x, gain, constant):
    return spatial.affine(x, gain, constant, LAYOUT, half=half, activation=activation)


def transform(route, layout, x):
    return transforms.forward(x, layout, route)


def inverse(route, layout, spectrum):
    return transforms.inverse(spectrum, layout, route, spectrum.dtype)


def covariances(at, size, x, **how):
    return matrices.covariances(x, (at, size), **how)[1:]


def blocks(number, size):
    return draw(3, number, size), draw(4, number, size, size)


def mix(at, activation, x, mean, matrix, bias):
    where = at, mean.shape[-1]
    return matrices.mix(x, mean, matrix, bias, where, activation=activation)


def spectrum(layout):
    *others, last = layout.sizes
    return draw(1, last // 2 + 1, 2, *others, *(layout.shape[i] for i in (0, 3)))


def cases():
    """Name: the function, and the shapes of what it is differentiated by, with seeds."""
    x, row, channel = draw(1, *SHAPE), (*SHAPE[:-1], 1), (1, 1, 1, SHAPE[-1])
    small = [2 + 0.3 * draw(s, *channel) for s in (4, 5, 6)]
    of_each = [2 + 0.3 * draw(s, 4, 3, 1, SHAPE[-1]) for s in (11, 12)] + [small[2]]
    row_of = lambda seed: draw(seed, *row)
    along, centre = [2 + 0.3 * draw(7, *row), *small[:2]], draw(3, *row)
    per_sample = [2 + 0.3 * draw(s, SHAPE[0], 1, 1, SHAPE[-1]) for s in (8, 9)]
    constant = draw(10, 2, *channel)
    return {
        "drop": (lambda x: jnp.sin(passes.inputs("drop", x, MASK)[0].carrier), x),
        "moments": (moments, x),
        "moments, mask": (functools.partial(moments, mask=jnp.asarray(MASK)), x),
        "moments, weights": (functools.partial(moments, mask=jnp.abs(row_of(1))), x),
        "moments, segments": (functools.partial(of_segments, weights=jnp.abs(row_of(2))), x),
        "moments, segments, mean square": (
            functools.partial(of_segments, axis=2, centred=False, channel_groups=1),
            x,
        ),
        "segments affine": (functools.partial(segments_affine, None), x, *of_each),
        "segments affine, relu": (functools.partial(segments_affine, jax.nn.relu), x, *of_each),
        "segments affine, softmax": (
            functools.partial(segments_affine, jax.nn.softmax),
            x,
            *of_each,
        ),
        "moments, mean square": (functools.partial(moments, centred=False), x),
        "moments, masked mean square": (
            functools.partial(moments, centred=False, mask=jnp.asarray(MASK)),
            x,
        ),
        "moments, groups": (functools.partial(moments, channel_groups=1), x),
        "inverse deviation": (lambda v: passes.inverse_deviation(v**2, 1e-3), x),
        "affine": (functools.partial(affine, None), x, *small),
        "affine, relu": (functools.partial(affine, jax.nn.relu), x, *small),
        "affine, softmax": (functools.partial(affine, jax.nn.softmax), x, *small),
        "affine, of samples": (functools.partial(affine, jnp.tanh), x, *per_sample, small[0]),
        "rows": (functools.partial(rows, None), x, *along, centre),
        "rows, relu": (functools.partial(rows, jax.nn.relu), x, *along, centre),
        "rows, gelu, no mean": (functools.partial(rows, jax.nn.gelu), x, *along),
        "gated": (functools.partial(gated, None, jax.nn.silu), x, draw(2, *SHAPE), *along, centre),
        "gated, softmax": (
            functools.partial(gated, None, jax.nn.softmax),
            x,
            draw(2, *SHAPE),
            *along,
        ),
        "gated, tanh, no function, no mean": (
            functools.partial(gated, jnp.tanh, None),
            x,
            draw(2, *SHAPE),
            *along,
        ),
        **{
            f"spatial moments, {half=}, {masked=}": (
                functools.partial(spatial_moments, half, mask),
                x,
            )
            for half in (False, True)
            for masked, mask in ((False, None), (True, jnp.asarray(SAMPLES)))
        },
        "spatial moments, odd width": (
            lambda x: spatial.moments(x, ODD, half=True)[1:],
            draw(1, *ODD.shape),
        ),
        "spatial affine": (functools.partial(spatial_affine, False, None), x, small[0], constant),
        "spatial affine, half, relu": (
            functools.partial(spatial_affine, True, jax.nn.relu),
            x,
            small[0],
            constant,
        ),
        "covariances": (functools.partial(covariances, (2, 3), 3), x),
        "covariances, weights": (
            functools.partial(covariances, (3,), 2, mask=jnp.abs(draw(1, 4, 3, 4, 1))),
            x,
        ),
        "covariances, variances": (
            functools.partial(covariances, (3,), 1, mask=jnp.asarray(SAMPLES), diagonal=True),
            x,
        ),
        "mix": (functools.partial(mix, (2, 3), None), x, *blocks(3, 3), draw(2, 4, 2)),
        "mix, relu": (functools.partial(mix, (3,), jax.nn.relu), x, *blocks(1, 2), draw(2, 2)),
        "mix, softmax, shared": (
            functools.partial(mix, (2,), jax.nn.softmax),
            x,
            *blocks(1, 2),
            draw(2, 4),
        ),
        **{
            f"{name}, {route}, {layout.sizes}": (
                functools.partial(function, route, layout),
                draw(1, *layout.shape) if function is transform else spectrum(layout),
            )
            for name, function in (("transform", transform), ("inverse", inverse))
            for route in ("matmul", "fft")
            for layout in (LAYOUT, ODD)
        },
    }


with jax.enable_x64(True):
    CASES = cases()


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def derivatives(function, point):
    """Values and derivatives of all kinds along fixed directions, to third order."""
    u, v, w = (
        tuple(jnp.cos(s + 0.1 * jnp.arange(a.size)).reshape(a.shape) for a in point)
        for s in (0.0, 1.0, 2.0)
    )

    def loss(*point):
        leaves = jax.tree.leaves(function(*point))
        return sum(jnp.sum(jnp.sin(a) * (1 + jnp.arange(a.size).reshape(a.shape))) for a in leaves)

    def along(function, direction):
        return lambda *at: jax.jvp(function, at, direction)[1]

    def dot(gradient, direction):
        return sum(map(jnp.vdot, gradient, direction))

    at = tuple(range(len(point)))
    gradient = jax.grad(loss, at)
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), point)
    steps = lambda x, _: (x + 0.1 * gradient(x, *point[1:])[0], loss(x, *point[1:]))
    return {
        "value": function(*point),
        "jvp": jax.jvp(function, point, u),
        "linearize": jax.linearize(function, *point)[1](*u),
        "grad": gradient(*point),
        "jvp of jvp": along(along(loss, u), v)(*point),
        "jvp of grad": along(gradient, u)(*point),
        "grad of jvp": jax.grad(along(loss, u), at)(*point),
        "grad of grad": jax.grad(lambda *p: dot(gradient(*p), u), at)(*point),
        "third": along(along(gradient, u), v)(*point),
        "third, reverse": jax.grad(lambda *p: dot(along(gradient, v)(*p), w), at)(*point),
        "remat": jax.grad(jax.checkpoint(loss), at)(*point),
        "scan": jax.grad(lambda x: jnp.sum(lax.scan(steps, x, None, length=2)[1]))(point[0]),
        "vmap of grad": jax.vmap(gradient)(*several),
        "grad of vmap": jax.grad(lambda s: jnp.sum(jax.vmap(loss)(*s) ** 2))(several),
        "one mapped": jax.vmap(gradient, (0, *(None,) * len(point[1:])))(several[0], *point[1:]),
    }


def each_pass():
    """All, of which those that are not the first of their pass are slow."""
    firsts = {name.partition(",")[0]: name for name in reversed(CASES)}
    for name in CASES:
        yield pytest.param(name, marks=[] if name in firsts.values() else [pytest.mark.slow])


@pytest.mark.parametrize("name", list(each_pass()))
def test_derivatives_are_those_of_the_formula(name):
    function, *point = CASES[name]
    run = lambda *point: derivatives(function, point)
    ours = jax.jit(run)(*point)
    with plain_derivatives():
        plain = jax.jit(lambda *point: run(*point))(*point)
    chex.assert_tree_all_finite(ours)
    for kind in plain:
        chex.assert_trees_all_close(ours[kind], plain[kind], **EXACT, custom_message=kind)


@pytest.mark.parametrize("name", CASES)
def test_a_mapped_axis_may_lie_anywhere(name):
    """JAX takes for granted that a function and its rule leave it at the same place."""
    function, x, *small = CASES[name]
    for axis in range(x.ndim + 1):
        several = jnp.stack([x] * 5, axis)
        mapped = jax.jit(jax.vmap(lambda x: function(x, *small), in_axes=axis))
        jax.jit(lambda x, f=mapped: jax.jvp(f, (x,), (x,))).lower(several)


@pytest.mark.parametrize("name", CASES)
def test_the_transpose_is_adjoint_and_the_tangent_the_slope(name):
    function, *point = CASES[name]
    adjoint, slope = derivative_gaps(function, *point)
    assert adjoint < 1e-11 and slope < 1e-7


@pytest.mark.parametrize("name", ("moments", "affine, relu", "rows", "spatial affine"))
def test_jacobians_and_hessian(name):
    function, x, *small = CASES[name]

    def one(row):
        leaves = jax.tree.leaves(function(x.at[0, 0].set(row), *small))
        return sum(jnp.sum(jnp.sin(a)) for a in leaves)

    kinds = jax.jacfwd(one), jax.jacrev(one), jax.hessian(one)
    found = jax.jit(lambda row: [f(row) for f in kinds])(x[0, 0])
    with plain_derivatives():
        plain = jax.jit(lambda row: [f(row) for f in (jax.grad(one), kinds[2])])(x[0, 0])
    chex.assert_trees_all_close(found, [plain[0], *plain], **EXACT)


def primitives(function, *args):
    """Names of all primitives of a program, those inside of others too."""
    found = set()

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            found.add(eqn.primitive.name)
            for value in jax.tree.leaves(
                eqn.params, is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    look(inner)

    look(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize("name", ("moments", "rows", "spatial affine", "transform, fft, (3, 4)"))
def test_the_switch_is_plain(name):
    function, *point = CASES[name]
    tangent = lambda *point: jax.jvp(function, point, point)
    assert "normjax_linear" in primitives(tangent, *point)
    own = {p for p in primitives(function, *point) if "normjax" in p}
    assert own == ({"normjax_moments"} if name == "moments" else set())
    with plain_derivatives():
        found = primitives(tangent, *point)
        assert not any("normjax" in p or "custom_jvp" in p for p in found), found


def test_a_wrong_rule_is_found():
    """Twice the tangent, twice the transpose, both: each breaks one of the two identities."""
    right = dict(saves=lambda y, x: x)
    tangent, transpose = lambda x, t: jnp.cos(x) * t[0], lambda x, g: (jnp.cos(x) * g,)
    twice = lambda f: lambda *args: jax.tree.map(lambda a: 2 * a, f(*args))
    for rules, adjoint, slope in (
        ((tangent, transpose), True, True),
        ((twice(tangent), transpose), False, False),
        ((tangent, twice(transpose)), False, True),
        ((twice(tangent), twice(transpose)), True, False),
    ):
        sine = differentiated(*rules, **right)(lambda x: jnp.sin(x))
        gaps = derivative_gaps(sine, draw(0, 5))
        assert (gaps[0] < 1e-12, gaps[1] < 1e-7) == (adjoint, slope)


@pytest.mark.parametrize("loop", (False, True))
def test_what_stops_is_constant_in_the_slope_too(loop):
    def function(x):
        y = jax.jit(jax.checkpoint(lambda x: lax.stop_gradient(x) * jnp.sin(x)))(x)
        return lax.map(lambda a: lax.stop_gradient(a) * a, y) if loop else y

    if loop:
        with pytest.raises(ValueError, match="inside of a scan"):
            derivative_gaps(function, draw(0, 5))
    else:
        assert derivative_gaps(function, draw(0, 5))[1] < 1e-7


def test_the_carrier_adds_up_wide_and_is_never_read():
    x = jnp.asarray(draw(0, 64, 32), jnp.bfloat16)

    def loss(x):
        x = passes.carried(x)
        near = passes.moments(x, (1,)).mean
        return jnp.sum(passes.affine(x, near, jnp.full((1, 1), 3.0)) * jnp.float32(1.0))

    dx = jax.grad(loss)(x)
    assert dx.dtype == jnp.bfloat16
    exact = jax.grad(loss)(x.astype(jnp.float64))
    chex.assert_trees_all_close(dx.astype(jnp.float64), exact, atol=1e-6)
    spoilt = Input(x, jnp.full(x.shape, jnp.nan, jnp.float32))
    chex.assert_tree_all_finite(passes.moments(spoilt, (1,)))


@pytest.mark.parametrize(("features", "size", "width"), [(12, 2, 12), (1536, 64, 512), (6, 6, 6)])
def test_wide_blocks_are_groups(features, size, width):
    """What stands for products of groups on TPUs; those of one block are products of one group."""
    assert matrices._width(features, size) == width
    a, b = draw(1, 5, features), draw(2, 5, features)
    matrix, where = draw(3, features // size, size, size), ((1,), size)
    wide = matrices._wide_gram(a, b, where, width), matrices._wide_times(a, matrix, where, width)
    narrow = matrices._gram(a, b, where), matrices._times(a, matrix, where)
    chex.assert_trees_all_close(wide, narrow, **EXACT)
    assert matrices._width(7 * 512 + 1, 64) == 64
