"""The forms of row norms in language models, against their equations in float64.

Those of Llama, Gemma and Qwen3-Next as in the classes `...RMSNorm` of transformers, that of
Mamba-2 as in its reference `rms_norm_ref`.
"""

import functools

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from agreement import close, draw, ragged
from flax import nnx
from ml_dtypes import bfloat16

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax.testing import derivative_gaps

EPSILON = 1e-6


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def centred(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)


def grouped(norm, groups, x):
    return norm(x.reshape(*x.shape[:-1], groups, -1)).reshape(x.shape)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


# By name: the method, and its equation in the parameters, x and the gate z.
FORMS = {
    "Llama": (nj.RMSNorm(cast="before_scale"), lambda p, x, z: p.scale * rms(x)),
    "Gemma": (nj.RMSNorm(scale_offset=1.0), lambda p, x, z: rms(x) * (1 + p.scale)),
    "Qwen3-Next, gated": (
        nj.RMSNorm(cast="before_scale"),
        lambda p, x, z: p.scale * rms(x) * silu(z),
    ),
    "Mamba-2, gated": (
        nj.RMSNorm(gate_place="before", num_groups=2),
        lambda p, x, z: grouped(rms, 2, x * silu(z)) * p.scale,
    ),
    "scale norm": (
        nj.RMSNorm(feature_axes=()),
        lambda p, x, z: p.scale * x / np.sqrt((x**2).sum(-1, keepdims=True) / 8 + EPSILON),
    ),
    "groups": (nj.RMSNorm(num_groups=4), lambda p, x, z: grouped(rms, 4, x) * p.scale),
    "groups, one scale, gated": (
        nj.RMSNorm(num_groups=2, feature_axes=(), gate_activation=None),
        lambda p, x, z: grouped(rms, 2, x) * p.scale * z,
    ),
    "layer norm, gated": (
        nj.LayerNorm(scale_offset=0.5, activation=jnp.tanh, gate_activation=jax.nn.sigmoid),
        lambda p, x, z: np.tanh(centred(x) * (0.5 + p.scale) + p.bias) * sigmoid(z),
    ),
    "layer norm, groups, gated in front": (
        nj.LayerNorm(num_groups=2, gate_place="before", use_scale=False, cast="before_scale"),
        lambda p, x, z: grouped(centred, 2, x * silu(z)) + p.bias,
    ),
}
GATED = {name: form for name, form in FORMS.items() if "gated" in name}
NAMES, NAMES_GATED = [(name,) for name in FORMS], [(name,) for name in GATED]


def given(name, dtype="float64", shape=(2, 3, 8)):
    """Parameters, an input and what is given beside it."""
    method, _ = FORMS[name]
    params, _ = agreement.variables(method, 8, dtype=dtype)
    inputs = {"gate": jnp.asarray(draw(6, *shape), dtype)} if name in GATED else {}
    return params, jnp.asarray(0.5 + draw(5, *shape), dtype), inputs


@functools.partial(jax.jit, static_argnames="name")
def run(name, params, x, inputs, mask=None):
    return FORMS[name][0].apply(params, (), x, train=True, mask=mask, **inputs)[0]


def exact(name, params, x, inputs):
    params, x, inputs = jax.tree.map(lambda a: np.asarray(a, "float64"), (params, x, inputs))
    return FORMS[name][1](params, x, inputs.get("gate"))


class FormsTest(parameterized.TestCase):
    @parameterized.parameters(*NAMES)
    def test_equation(self, name):
        with jax.enable_x64(True):
            params, x, inputs = given(name)
            close(run(name, params, x, inputs), exact(name, params, x, inputs), 1e-10)

    @parameterized.parameters(*NAMES)
    def test_derivatives(self, name):
        """In both modes and of the second order; the slope is that of the equation."""
        with jax.enable_x64(True):
            params, x, inputs = given(name)
            function = functools.partial(run, name)
            loss = lambda *at: jnp.sum(jnp.sin(function(*at)))
            for one in (function, jax.grad(loss, (0, 1, 2))):
                adjoint, slope = derivative_gaps(one, params, x, inputs)
                assert adjoint < 1e-11 and slope < 1e-6
            at = params, x, inputs
            pulled, rng, step = jax.grad(loss, (0, 1, 2))(*at), np.random.default_rng(8), 1e-5
            along = jax.tree.map(lambda a: rng.normal(size=a.shape), at)
            ends = [jax.tree.map(lambda a, d, s=s: a + s * step * d, at, along) for s in (1, -1)]
            ahead, behind = (np.sum(np.sin(exact(name, *end))) for end in ends)
            dot = sum(map(np.vdot, *map(jax.tree.leaves, (pulled, along))))
            np.testing.assert_allclose(dot, (ahead - behind) / (2 * step), rtol=1e-6)

    @parameterized.parameters(*NAMES)
    def test_masked_positions_reach_nothing(self, name):
        with jax.enable_x64(True):
            params, x, inputs = given(name)
            mask = ragged(1, 2, 3, 1)
            lost = jax.tree.map(lambda a: jnp.where(mask, a, jnp.nan), (x, inputs))
            loss = lambda *at: jnp.sum(jnp.where(mask, jnp.sin(run(name, *at, mask)), 0))
            value, pulled = jax.value_and_grad(loss, (0, 1, 2))(params, *lost)
            wanted = np.where(mask, np.sin(exact(name, params, x, inputs)), 0).sum()
            close(value, wanted, 1e-10)
            chex.assert_tree_all_finite(pulled)
            chex.assert_trees_all_equal(
                jax.tree.map(lambda a: jnp.where(mask, 0, a), pulled[1:]),
                jax.tree.map(jnp.zeros_like, pulled[1:]),
            )

    @parameterized.parameters(*NAMES_GATED)
    def test_backward_pass_keeps_the_input_and_the_gate(self, name):
        for dtype in ("float32", "bfloat16"):
            params, x, inputs = given(name, dtype, (4, 16, 8))
            params = jax.tree.map(lambda a: a.astype("float32"), params)
            program = jax.jit(lambda *at: jax.vjp(functools.partial(run, name), *at))
            kept = jax.tree.leaves(program.trace(params, x, inputs).out_info[1])
            assert [a.dtype for a in kept if a.size == x.size] == [x.dtype] * 2

    @parameterized.parameters(*NAMES)
    def test_half_precision_is_rounded_once_both_ways(self, name):
        """With the cast before the scale, the gradients alone."""
        params, x, inputs = given(name, "bfloat16", (16, 8, 8))
        params = jax.tree.map(lambda a: a.astype("float32"), params)
        function = functools.partial(run, name)
        g = (10 + draw(7, *x.shape)).astype("float32").astype(bfloat16)
        y, pull = jax.vjp(function, params, x, inputs)
        with jax.enable_x64(True):
            at = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, "float64")), (params, x, inputs))
            _, pull_exactly = jax.vjp(function, *at)
            wanted = pull_exactly(np.asarray(g, "float64"))[1:]
        pairs = list(zip(*map(jax.tree.leaves, (pull(g)[1:], wanted)), strict=True))
        if FORMS[name][0].cast == "output":
            pairs.append((y, exact(name, params, x, inputs)))
        for got, best in pairs:
            best = np.asarray(best)
            chex.assert_type(got, bfloat16)
            size = lambda a, best=best: np.sqrt(np.mean((np.asarray(a, "float64") - best) ** 2))
            assert size(got) <= 1.1 * size(best.astype(bfloat16))


class CastTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_bfloat16_is_that_of_transformers(self, gated):
        """`weight * hidden.to(input_dtype)`, and the gate in float32 behind it."""
        method = nj.RMSNorm(cast="before_scale", param_dtype=jnp.bfloat16)
        x, z = (draw(i, 64, 128).astype(bfloat16) for i in (0, 1))
        scale = (1 + 0.3 * draw(2, 128)).astype(bfloat16)
        inputs = {"gate": jnp.asarray(z)} if gated else {}
        step = jax.jit(
            lambda *a, **k: method.apply(nj.AffineParams(a[0]), (), a[1], train=True, **k)
        )
        y, _ = step(scale, x, **inputs)
        wanted = scale * rms(x.astype("float64")).astype(bfloat16)
        if gated:
            wanted = (wanted.astype("float64") * silu(z.astype("float64"))).astype(bfloat16)
        equal = np.mean(np.asarray(y) == wanted)
        assert equal > 0.995, equal  # but for ties of roundings
        other, _ = nj.RMSNorm().apply(nj.AffineParams(scale), (), x, train=True, **inputs)
        assert np.mean(np.asarray(other) == wanted) < 0.95

    def test_wide_input_is_not_rounded(self):
        x, params = draw(0, 4, 8), nj.AffineParams(jnp.ones(8))
        y, _ = nj.RMSNorm(cast="before_scale").apply(params, (), x, train=True)
        z, _ = nj.RMSNorm().apply(params, (), x, train=True)
        chex.assert_trees_all_equal(y, z)

    def test_offset_is_added_in_float32(self):
        """A scale of 2e-3 around one is lost in bfloat16, whose next number is 1.0078."""
        method = nj.RMSNorm(scale_offset=1.0, param_dtype=jnp.bfloat16, dtype=jnp.float32)
        x = draw(0, 4, 8).astype(bfloat16)
        y, _ = method.apply(nj.AffineParams(jnp.full(8, 2e-3, jnp.bfloat16)), (), x, train=True)
        z, _ = nj.RMSNorm(dtype=jnp.float32).apply(nj.AffineParams(jnp.ones(8)), (), x, train=True)
        scale = 1 + float(bfloat16(2e-3))
        np.testing.assert_allclose(y / z, scale, rtol=1e-6)
        found = method.evaluation(nj.AffineParams(jnp.full(8, 2e-3, jnp.bfloat16)), (), x).scale
        np.testing.assert_allclose(found, scale, rtol=1e-6)  # XLA leaves roundings out


class ParametersTest(parameterized.TestCase):
    def test_the_default_scale_starts_at_one(self):
        for offset in (0.0, 1.0, 0.25):
            method = nj.RMSNorm(scale_offset=offset, param_dtype=jnp.bfloat16)
            scale = method.init(None, 4)[0].scale
            chex.assert_trees_all_equal(scale, jnp.full(4, 1 - offset, jnp.bfloat16))
        given = nj.LayerNorm(scale_offset=1.0, scale_init=jax.nn.initializers.constant(0.5))
        chex.assert_trees_all_equal(given.init(None, 4)[0].scale, jnp.full(4, 0.5))
        assert nj.RMSNorm(scale_offset=1.0, use_scale=False).init(None, 4)[0].scale is None

    @parameterized.parameters("linen", "nnx")
    def test_modules(self, front):
        x, z = draw(0, 4, 8), draw(1, 4, 8)
        fields = dict(feature_axes=(), gate_place="before", num_groups=2)
        if front == "linen":
            norm = normjax.linen.RMSNorm(**fields)
            variables = norm.init(jax.random.key(0), x, gate=z)
            scale, y = variables["params"]["scale"], norm.apply(variables, x, gate=z)
        else:
            norm = normjax.nnx.RMSNorm(8, **fields, rngs=nnx.Rngs(0))
            scale, y = norm.scale[...], norm(x, gate=z)
        assert scale.shape == ()
        close(y, grouped(rms, 2, x * silu(z)), 1e-5)

    def test_observe_is_of_groups(self):
        x = draw(0, 4, 8)
        seen = nj.LayerNorm(num_groups=2).observe(x)
        wanted = np.repeat(x.reshape(4, 2, 4).mean(-1), 4, axis=-1)
        close(seen.mean, wanted, 1e-6)
        chex.assert_trees_all_equal(seen.count, np.full((4, 8), 4, "float32"))

    @parameterized.parameters(
        dict(num_groups=2, reduction_axes=(0, 1)),
        dict(num_groups=2, feature_axes=(0, 1)),
        dict(num_groups=0),
        dict(cast="after"),
        dict(gate_place="behind"),
        dict(gate_activation="silu"),
        dict(scale_offset=np.inf),
        dict(reduction_axes=()),
    )
    def test_rejects_field(self, **fields):
        agreement.check_rejects(self, ("RMSNorm", *fields), nj.RMSNorm, **fields)

    def test_rejects_inputs(self):
        method, x = nj.RMSNorm(), draw(0, 4, 6)
        params, state = method.init(None, 6)
        apply = functools.partial(method.apply, params, state, x, train=True)
        check = functools.partial(agreement.check_rejects, self)
        check(("RMSNorm", "(4, 1)", "(4, 6)"), apply, gate=x[:, :1])
        check(("RMSNorm", "complex"), apply, gate=x.astype("complex64"))
        check(
            ("RMSNorm", "num_groups=4", "6"),
            nj.RMSNorm(num_groups=4).apply,
            params,
            state,
            x,
            train=True,
        )
        check(
            ("LayerNorm", "fewer groups"),
            nj.LayerNorm(num_groups=6).apply,
            params,
            state,
            x,
            train=True,
        )
