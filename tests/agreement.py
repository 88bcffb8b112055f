"""Compares normjax's methods with the reference vectors and the float64 oracles."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import vector_files

from normjax.core.method import replace

TOLERANCE = {"float32": 2e-5, "float64": 1e-10}  # absolute and, beyond one, relative
KINDS = (("float32", False), ("float64", True))  # dtype and whether masked, of a case's two runs
OFFSET_TOLERANCE = 1e-5  # relative error of a float32 variance at offset / std = 1e4
DEVICES_OFFSET_TOLERANCE = 2e-4  # the same over eight devices: their means are rounded to float32
ROUNDING_FACTOR = 1.2  # bfloat16 output error against that of rounding the exact output


def close(actual, desired, tolerance):
    chex.assert_trees_all_close(actual, desired, atol=tolerance, rtol=tolerance)


def draw(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def ragged(seed, *shape, share=0.7):
    """A boolean mask with about `share` of the positions valid."""
    return np.random.default_rng(seed).random(shape) < share


def variables(method, features, *, seed=100, count=3.0, dtype="float32"):
    """Parameters and state as of `method.init`, but `count` updates old, and the rest random."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name, value = path[-1].name, rng.normal(size=leaf.shape)
        if name == "count":
            value = count
        elif name == "var":
            value = 0.5 + value**2
        elif name in ("cov", "matrix"):
            value = 0.5 * np.eye(leaf.shape[-1]) + value @ value.swapaxes(-1, -2) / leaf.shape[-1]
        elif name in ("scale", "alpha"):
            value = 1 + 0.3 * value
        return jnp.asarray(value, dtype)

    return jax.tree.map_with_path(fill, shapes(method, features))


def shapes(method, features):
    """What `method.init` returns, without a program: shapes and dtypes."""
    return jax.eval_shape(lambda: method.init(jax.random.key(0), features))


@functools.partial(jax.jit, static_argnames=("method", "train"))
def run(method, params, state, x, *, train=True, mask=None, cotangent=None):
    """Output, new state and, given a cotangent, the gradients of params and x."""

    def forward(params, x):
        return method.apply(params, state, x, train=train, mask=mask)

    if cotangent is None:
        return *forward(params, x), None
    y, pull, new = jax.vjp(forward, params, x, has_aux=True)
    return y, new, pull(cotangent)


def replaced(tree, fields):
    """A tuple with `fields` in place of its own, or a dict of tuples with a dict of fields each."""
    if isinstance(tree, dict):
        return {name: replaced(part, fields[name]) for name, part in tree.items()}
    return tree._replace(**fields)


def start(name, **changes):
    """Method, parameters and first state (zero, if the file has none) of a vector file.

    The method is the recorded one with `changes` to its fields, and those of its parts.
    """
    _, arrays = vector_files.load(name)
    method, dtype = replace(vector_files.method(name), **changes), vector_files.dtype(name)
    given, tracked = (vector_files.fields(name, prefix) for prefix in ("param_", "state_0_"))
    features = np.shape(arrays.get("param_scale", np.empty(arrays["x_1"].shape[-1])))
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, dtype), shapes(method, features))
    return method, replaced(zeros[0], given), replaced(zeros[1], tracked) if tracked else zeros[1]


def check_vectors(name, **changes):
    """Three training steps, the gradients of the first and an evaluation, all as recorded.

    `changes`: those of `start`.
    """
    config, arrays = vector_files.load(name)
    dtype = vector_files.dtype(name)
    tolerance = TOLERANCE[dtype]
    given, tracked = (vector_files.fields(name, prefix) for prefix in ("param_", "state_0_"))
    with jax.enable_x64(dtype == "float64"):
        method, params, state = start(name, **changes)
        for k in (1, 2, 3):
            x, cotangent = (jnp.asarray(arrays[key]) for key in (f"x_{k}", "cotangent"))
            y, state, (dparams, dx) = run(method, params, state, x, cotangent=cotangent)
            close(y, arrays[f"y_{k}"], tolerance)
            if tracked:
                recorded = vector_files.fields(name, f"state_{k}_")
                chex.assert_trees_all_equal_structs(recorded, tracked)
                close(state, replaced(state, recorded), tolerance)
            if k == 1:
                close(dx, arrays["grad_x"], tolerance)
                recorded = vector_files.fields(name, "grad_")
                recorded.pop("x", None)
                chex.assert_trees_all_equal_structs(recorded, given)
                close(dparams, replaced(dparams, recorded), tolerance)
        if "eps_at_inference" in config:
            method = replace(method, epsilon=config["eps_at_inference"])
        y, _, _ = run(method, params, state, jnp.asarray(arrays["x_eval"]), train=not tracked)
        close(y, arrays["y_eval"], tolerance)


def check_oracle(method, features, x, *, mask=None, train=True, count=3.0, dtype="float32"):
    """Output, state and, in training, gradients against the oracle; masked inputs become NaN."""
    tolerance = TOLERANCE[dtype]
    with jax.enable_x64(dtype == "float64"):
        x = np.asarray(x, dtype)
        if mask is not None:
            x = np.where(mask, x, np.asarray(np.nan, dtype))
        params, state = variables(method, features, count=count, dtype=dtype)
        g = draw(200, *x.shape, dtype=dtype) if train else None
        y, new, pulled = run(method, params, state, x, train=train, mask=mask, cotangent=g)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        chex.assert_type(y, dtype)
        expected_y, expected_state = oracles.apply(method, params, state, x, train=train, mask=mask)
        close(y, expected_y.astype(dtype), tolerance)
        close(new, jax.tree.map(lambda a: np.asarray(a, dtype), expected_state), tolerance)
        if g is None:
            return
        dparams, dx = pulled
        chex.assert_tree_all_finite((dparams, dx))
        if oracles.has_gradients(method):
            expected = oracles.gradients(method, params, state, x, g, mask=mask)
            actual = (dx, *(field(dparams, name) for name in ("scale", "bias")))
            leaves = functools.partial(jax.tree.leaves, is_leaf=lambda a: a is None)
            for ours, theirs in zip(leaves(actual), leaves(expected), strict=True):
                if ours is not None:
                    close(ours, theirs.astype(dtype), tolerance)


def field(tree, name):
    """A field of a tuple, or None; of a dict of tuples a dict of theirs."""
    if isinstance(tree, dict):
        return {link: field(part, name) for link, part in tree.items()}
    return getattr(tree, name, None)


def check_case(make, case, kind, *, train=True):
    """`check_oracle` of `make(**fields)` for a case of fields, shape and features.

    A field `mask` is the shape of the mask; without it the mask hides single positions.
    """
    fields, (dtype, masked) = dict(case), kind
    shape, features = fields.pop("shape"), fields.pop("features")
    mask = fields.pop("mask", shape)
    mask = ragged(1, *mask) if masked else None
    method, x = make(**fields), draw(0, *shape)
    check_oracle(method, features, x, mask=mask, train=train, dtype=dtype)


def check_slopes(loss, at, *, step=1e-6, tolerance=1e-4):
    """Derivatives of a number in both modes along one direction, against a central difference."""
    rng = np.random.default_rng(300)
    along = jax.tree.map(lambda a: rng.normal(size=np.shape(a)), at)

    @jax.jit
    def derivatives(at, along):
        every = tuple(range(len(at)))
        return jax.jvp(loss, at, along)[1], jax.grad(loss, every)(*at)

    value = jax.jit(loss)
    ahead, behind = (
        value(*jax.tree.map(lambda a, d, s=s: a + s * d, at, along)) for s in (step, -step)
    )
    forward, gradients = derivatives(at, along)
    backward = sum(map(np.vdot, *map(jax.tree.leaves, (gradients, along))))
    difference = (np.asarray(ahead) - behind) / (2 * step)
    np.testing.assert_allclose([forward, backward], difference, rtol=tolerance, atol=tolerance)


def check_offset(method, shape, axes):
    """The float32 variance at offset / std = 1e4, seen in the slope of a method without scale."""
    x = (1e4 + draw(0, *shape)).astype("float32")
    y, _, _ = run(method, *method.init(jax.random.key(0), shape[-1]), x)
    exact, y = x.astype("float64"), np.asarray(y, "float64")
    exact -= exact.mean(axes, keepdims=True)
    std = (exact**2).sum(axes) / (exact * y).sum(axes)
    np.testing.assert_allclose(
        std**2 - method.epsilon, (exact**2).mean(axes), rtol=OFFSET_TOLERANCE
    )


def check_dtypes(method, features, x, *, output=None):
    """Output dtype: `output` or else the input's; statistics and every gradient keep theirs."""
    params, state = shapes(method, features)
    for dtype in ("bfloat16", "float16", "float32"):
        x, out = jax.ShapeDtypeStruct(x.shape, dtype), output or dtype
        g = jax.ShapeDtypeStruct(x.shape, out)
        y, new, grads = jax.eval_shape(
            functools.partial(run, method), params, state, x, cotangent=g
        )
        chex.assert_type(y, out)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        chex.assert_trees_all_equal_shapes_and_dtypes((params, x), grads)


def check_rounding(method, features, x):
    """A bfloat16 output is about as near to the exact one as a bfloat16 number can be."""
    x = np.asarray(x).astype("bfloat16")
    params, state = variables(method, features)
    y, _, _ = run(method, params, state, x)
    exact, _ = oracles.apply(method, params, state, x, train=True)
    error = np.abs(np.asarray(y).astype("float64") - exact)
    best = np.abs(exact.astype(y.dtype).astype("float64") - exact)
    assert error.max() <= ROUNDING_FACTOR * best.max(), (error.max(), best.max())
    rms, best_rms = np.sqrt(np.mean(error**2)), np.sqrt(np.mean(best**2))
    assert rms <= ROUNDING_FACTOR * best_rms, (rms, best_rms)


def check_rejects(test, pieces, function, *args, **kwargs):
    """The call raises ValueError or TypeError whose text has every one of `pieces`."""
    with test.assertRaises((ValueError, TypeError)) as caught:
        function(*args, **kwargs)
    for piece in pieces:
        test.assertIn(str(piece), str(caught.exception))


def check_rejects_input(test, method, features, x, mask, *pieces):
    params, state = variables(method, features)
    pieces = (type(method).__name__, *pieces)
    check_rejects(test, pieces, method.apply, params, state, x, train=True, mask=mask)
