"""Norms of weights: recorded layers, and the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import vector_files
from agreement import TOLERANCE, close, draw
from jax import lax
from methods import weights_oracle

import normjax as nj

KEY = jax.random.key(0)


# Recorded layers.


def layer(config, kernel, bias, x):
    """What a recorded layer makes of `x` with a normalized kernel."""
    if x.ndim == 2:
        y = x @ kernel
    else:
        strides = np.broadcast_to(config.get("stride", 1), 2).tolist()
        padding = [(p, p) for p in config["padding"]]
        dilated = (1, 1)
        if "output_padding" in config:  # a transposed convolution
            pads = zip(kernel.shape, config["padding"], config["output_padding"], strict=False)
            padding = [(n - 1 - p, n - 1 - p + more) for n, p, more in pads]
            kernel, strides, dilated = kernel[::-1, ::-1], (1, 1), strides
        y = lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=dilated,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=config.get("groups", 1),
        )
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def recorded(name):
    """Method, kernel, scale and bias of a vector file, and the names of the first two there."""
    kind, (config, arrays) = vector_files.INDEX[name]["method"], vector_files.load(name)
    kernel = "v" if kind == "weight_norm" else "kernel"
    scale = {"weight_norm": "g", "scaled_std_conv": "gain"}.get(kind, "scale")
    values = [arrays.get(f"param_{part}") for part in (kernel, scale, "bias")]
    if kind == "weight_norm":
        method = nj.WeightNorm(feature_axes=() if config.get("torch_dim", 0) is None else -1)
    elif kind == "std_conv":
        method = nj.WeightStandardization(epsilon=config["eps"])
    elif kind == "scaled_std_conv":
        fields = dict(epsilon=config["eps"], gamma=config["gamma"])
        method = nj.ScaledWeightStandardization(**fields)
    else:
        norm = nj.StrictWeightNorm if values[1] is None else nj.WeightNorm
        strides = config["stride"] if kind == "wn_conv_transpose" else 1
        method = norm(epsilon=config["eps"], epsilon_place="norm", strides=strides)
    return method, values, (kernel, scale, "bias")


KINDS = "weight_norm wn_linear wn_conv wn_conv_transpose std_conv scaled_std_conv".split()


@pytest.mark.parametrize("name", [name for kind in KINDS for name in vector_files.names(kind)])
def test_recorded_layers(name):
    config, arrays = vector_files.load(name)
    with jax.enable_x64(True):
        method, values, names = recorded(name)
        kernel, scale, bias = jax.tree.map(jnp.asarray, values)
        x, *others = (jnp.asarray(arrays[k]) for k in ("x_1", "x_2", "x_3", "x_eval"))

        @jax.jit
        def run(kernel, scale, bias, x):
            params = () if scale is None else nj.AffineParams(scale)
            return layer(config, method.apply(params, (), kernel, train=True)[0], bias, x)

        y, pull = jax.vjp(run, kernel, scale, bias, x)
        close(y, arrays["y_1"], 1e-10)
        gradients = zip(pull(jnp.asarray(arrays["cotangent"])), (*names, "x"), strict=True)
        for a, part in gradients:
            if a is not None:
                close(a, arrays[f"grad_{part}"], 1e-10)
        for k, x in zip(("2", "3", "eval"), others, strict=True):
            close(run(kernel, scale, bias, x), arrays[f"y_{k}"], 1e-10)


@pytest.mark.parametrize("name", vector_files.names("spectral_norm"))
def test_recorded_spectral_norms(name):
    """From the vector after the first step on: the recorded code starts from the other one."""
    config, arrays = vector_files.load(name)
    method = nj.SpectralWeightNorm(iterations=config["n_power_iterations"])
    with jax.enable_x64(True):
        kernel, bias = jnp.asarray(arrays["param_kernel"]), jnp.asarray(arrays["param_bias"])
        state = nj.PowerIteration(jnp.asarray(arrays["state_1_u"]))

        def run(kernel, bias, x, state, train):
            normal, state = method.apply((), state, kernel, train=train)
            return layer(config, normal, bias, x), state

        first = lambda *point: run(*point, state, False)[0]
        y, pull = jax.vjp(first, kernel, bias, jnp.asarray(arrays["x_1"]))
        close(y, arrays["y_1"], 1e-10)
        wanted = tuple(arrays[f"grad_{n}"] for n in ("kernel", "bias", "x"))
        close(pull(jnp.asarray(arrays["cotangent"])), wanted, 1e-10)
        for k in (2, 3):
            y, state = run(kernel, bias, jnp.asarray(arrays[f"x_{k}"]), state, True)
            close((y, state.vector), (arrays[f"y_{k}"], arrays[f"state_{k}_u"]), 1e-10)
        y, _ = run(kernel, bias, jnp.asarray(arrays["x_eval"]), state, False)
        close(y, arrays["y_eval"], 1e-10)


# The equations.


def exact(seed, *shape):
    return jnp.asarray(draw(seed, *shape, dtype="float64"))


METHODS = (
    nj.WeightNorm(),
    nj.WeightNorm(feature_axes=(1, -1), strides=(2,), epsilon=0.1, epsilon_place="norm"),
    nj.StrictWeightNorm(feature_axes=(), epsilon=0.1, strides=3),
    nj.WeightStandardization(feature_axes=0, epsilon=0.1),
    nj.ScaledWeightStandardization(gamma=1.7),
    nj.SpectralWeightNorm(feature_axes=(0, -1), iterations=2, epsilon=0.1),
    nj.SpectralWeightNorm(operator="bound", strides=2),
    nj.SpectralWeightNorm(operator="torus", map_size=(5,)),
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_oracle(method, dtype):
    kernel = draw(0, 3, 4, 5, dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        params, state = jax.tree.map(lambda a: a.astype(dtype), method.init(KEY, kernel))
        params = jax.tree.map(lambda a: a + draw(1, *a.shape, dtype=dtype), params)
        for train in (True, False):
            y, new = method.apply(params, state, kernel, train=train)
            wanted, moved = oracles.apply(method, params, state, kernel, train=train)
            cast = lambda tree: jax.tree.map(lambda a: np.asarray(a, dtype), tree)
            assert y.dtype == dtype
            close((y, new), cast((wanted, moved)), TOLERANCE[dtype])


def test_a_strict_norm_fixes_directions_and_variances():
    """The gradient is orthogonal to the rows; their lengths do not count; white stays white."""
    method = nj.StrictWeightNorm()
    with jax.enable_x64(True):
        kernel, x = exact(0, 3, 3, 2, 4), exact(1, 1, 6, 6, 2)
        config = {"padding": (1, 1)}
        run = lambda k: layer(config, method.apply((), (), k, train=True)[0], None, x)
        slopes = jax.grad(lambda k: jnp.sum(jnp.sin(run(k))))(kernel)
        close(jnp.sum(slopes * kernel, (0, 1, 2)), np.zeros(4), 1e-10)
        close(run(kernel * jnp.array([0.1, 1, 7, 1e3]).reshape(1, 1, 1, 4)), run(kernel), 1e-10)
        normal, _ = method.apply((), (), kernel, train=True)
        close(jnp.sum(normal**2, (0, 1, 2)), np.ones(4), 1e-10)


@pytest.mark.parametrize("window, strides", [((4,), (2,)), ((3,), (2,)), ((5,), (3,))])
def test_strict_transposed_convolutions_keep_the_variance(window, strides):
    """Of white input, exactly, in the mean over the places that see different taps."""
    kernel, period = draw(0, *window, 3, 2, dtype="float32"), strides[0]
    normal, _ = nj.StrictWeightNorm(strides=strides).apply((), (), kernel, train=True)
    apply = lambda x: lax.conv_transpose(
        x[None], normal, strides, "SAME", None, ("NHC", "HIO", "NHC")
    )
    matrix = jax.jacobian(lambda x: apply(x)[0])(jnp.ones((9, 3)))
    variances = np.sum(np.square(matrix), (2, 3))[3 * period : 6 * period]
    np.testing.assert_allclose(variances.mean(0), 1, rtol=1e-5)


def test_strict_norms_with_thresholds_make_what_relu_makes_inside_of_the_borders():
    """Two layers: the affine map behind the threshold goes into the next, but for its padding."""
    with jax.enable_x64(True):
        first, second = exact(0, 3, 3, 2, 4), exact(1, 3, 3, 4, 3)
        bias, x = exact(2, 4), exact(3, 1, 8, 8, 2)
        conv = lambda kernel, x: layer({"padding": (1, 1)}, kernel, None, x)
        row = lambda a: a.reshape(1, 1, 1, -1)
        plain = conv(second, jax.nn.relu(conv(first, x) + row(bias)))
        norm = jnp.sqrt(jnp.sum(first**2, (0, 1, 2)))
        normal, _ = nj.StrictWeightNorm().apply((), (), first, train=True)
        params = nj.ThresholdParams(-bias / norm)
        z, _ = nj.TReLU().apply(params, (), conv(normal, x), train=True)
        scaled = second * norm.reshape(1, 1, 4, 1)
        y = conv(scaled, z) + row(jnp.einsum("hwio,i->o", second, bias))
        close(y[:, 1:-1, 1:-1], plain[:, 1:-1, 1:-1], 1e-10)
        assert np.max(np.abs(y - plain)[:, 0]) > 0.1


def test_the_factor_of_a_convolution():
    """The form "torus" is that of the dense operator; the matrix is off; "bound" is above both."""
    kernel, size = draw(0, 3, 3, 4, 5).astype("float32"), (8, 8)
    kernel = kernel + 0.5  # a strong lowest frequency
    largest = np.linalg.norm(weights_oracle.dense(kernel.astype("float64"), size), 2)
    method = lambda **how: nj.SpectralWeightNorm(iterations=200, **how)

    def factor(method):
        params, state = method.init(KEY, kernel)
        y, _ = method.apply(params, state, kernel, train=True)
        return np.linalg.norm(kernel) / np.linalg.norm(y)

    torus = dict(operator="torus", map_size=size)
    np.testing.assert_allclose(factor(method(**torus)), largest, rtol=1e-5)
    np.testing.assert_allclose(factor(method(**torus, feature_axes=-2)), largest, rtol=1e-5)
    assert factor(method()) < 0.5 * largest
    assert largest < factor(method(operator="bound")) < 3 * largest
    one, two = (factor(nj.SpectralWeightNorm(operator="bound", strides=n)) for n in (1, 2))
    assert one / two == pytest.approx(3 / 2, rel=1e-4)
    with jax.enable_x64(True):
        weight = exact(1, *kernel.shape)
        run = lambda k: jnp.sum(method(**torus).apply((), (), k, train=True)[0] * weight)
        at, along, h = exact(0, *kernel.shape), exact(2, *kernel.shape), 1e-6
        slopes = jax.grad(run)(at)
        ends = [run(at + s * along) for s in (h, -h)]
        np.testing.assert_allclose(
            jnp.vdot(slopes, along), (ends[0] - ends[1]) / (2 * h), rtol=1e-6
        )


def test_zeros_are_harmless():
    """A weight norm of zeros is the plain layer; others give zeros, and the vector stays."""
    zeros = jnp.zeros((4, 3))
    behind = nj.StrictWeightNorm(epsilon=1e-8, epsilon_place="norm")
    others = nj.StrictWeightNorm(), nj.WeightStandardization(), nj.SpectralWeightNorm()
    for method in (behind, *others):
        params, state = method.init(KEY, zeros)
        run = lambda k, m=method, p=params, s=state: m.apply(p, s, k, train=True)
        y, new = run(zeros)
        np.testing.assert_array_equal(y, zeros)
        assert np.isfinite(jax.grad(lambda k, run=run: jnp.sum(run(k)[0]))(zeros)).all()
        for vector in jax.tree.leaves(new):
            np.testing.assert_array_equal(vector, *state)
            np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-6)
    method = nj.WeightNorm()
    params, _ = method.init(KEY, zeros)
    slopes = jax.grad(lambda k: jnp.sum(method.apply(params, (), k, train=True)[0]))(zeros)
    np.testing.assert_allclose(slopes, np.ones((4, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape", "text"),
    [
        (nj.WeightNorm, (5,), r"kernel of shape \(5,\) has no rows"),
        (nj.StrictWeightNorm, (3, 0), r"kernel of shape \(3, 0\) has no rows"),
        (nj.WeightStandardization, (), "out of range"),
        (lambda: nj.WeightNorm(feature_axes=(0, 1)), (3, 2), "has no rows"),
        (lambda: nj.StrictWeightNorm(strides=(2, 2)), (3, 4, 4), "window .3,.: give an integer"),
        (lambda: nj.WeightNorm(epsilon=0.0), (3, 2), "epsilon=0.0 is not a finite number > 0"),
        (lambda: nj.SpectralWeightNorm(operator="torus"), (3, 2), "map_size=None"),
        (lambda: nj.SpectralWeightNorm(map_size=(8, 8)), (3, 2), "exactly 'torus'"),
        (
            lambda: nj.SpectralWeightNorm(operator="torus", map_size=(2, 8)),
            (3, 3, 2, 4),
            "map_size=.2, 8. does not fit a kernel",
        ),
        (
            lambda: nj.SpectralWeightNorm(operator="bound", axis_name="a"),
            (3, 2),
            "axis_name='a', but it takes whole kernels",
        ),
        (
            lambda: nj.SpectralWeightNorm(operator="torus", map_size=(8,), feature_axes=(0, 1)),
            (3, 2),
            "needs one axis",
        ),
    ],
)
def test_bad_kernels_and_fields(make, shape, text):
    with pytest.raises(ValueError, match=text):
        method = make()
        kernel = jnp.ones(shape)
        method.apply(*method.init(KEY, kernel), kernel, train=True)


def test_parameters_that_do_not_fit():
    kernel = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"WeightNorm: .* made for \(2,\)"):
        nj.WeightNorm().apply(nj.AffineParams(jnp.ones(2)), (), kernel, train=True)
    with pytest.raises(ValueError, match=r"SpectralWeightNorm: .* made for \(4,\)"):
        nj.SpectralWeightNorm().apply((), nj.PowerIteration(jnp.ones(4)), kernel, train=True)
    with pytest.raises(TypeError, match="kernel has dtype complex64"):
        nj.StrictWeightNorm().init(KEY, kernel.astype(jnp.complex64))
