"""Affine and DynamicTanh."""

from itertools import cycle

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vector_files
from absl.testing import parameterized
from agreement import TOLERANCE, close, draw, ragged, run, variables

import normjax as nj

KEY = jax.random.key(0)
CASES = (
    dict(shape=(6, 4), features=4),
    dict(shape=(4,), features=4),
    dict(shape=(2, 3, 4), features=3, axis=1, use_scale=False),
    dict(shape=(2, 3, 4), features=(2, 4), axis=(0, 2), use_bias=False),
    dict(shape=(1, 1), features=1, use_scale=False, use_bias=False),
)
BAD_INPUT = (
    (dict(axis=2), draw(0, 6, 4), None, "axis=2"),
    (dict(), draw(0, 6, 5), None, "5"),
    (dict(), np.float32(1), None, "()"),
    (dict(), draw(0, 6, 4).astype("complex64"), None, "complex64"),
    (dict(), draw(0, 6, 4), np.ones(6, bool), "(6,)"),
)


class AffineTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("channel_affine"))
    def test_vectors(self, name):
        agreement.check_vectors(name)

    ORACLE = (*CASES, dict(CASES[0], activation=jax.nn.relu))

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.Affine, case, kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.Affine, case, kind)

    @parameterized.parameters(False, True)
    def test_gradients(self, masked):
        method, x, g = nj.Affine(), draw(0, 6, 3, 4), draw(1, 6, 3, 4)
        mask = ragged(2, *x.shape, share=0.6 if masked else 2)
        params, state = variables(method, 4)
        _, _, (dparams, dx) = run(method, params, state, x, mask=mask, cotangent=g)
        scale = np.asarray(params.scale)
        expected = (g * scale * mask, (g * x * mask).sum((0, 1)), g.sum((0, 1)))
        close((dx, dparams.scale, dparams.bias), expected, TOLERANCE["float32"])

    def test_dtypes_and_rounding(self):
        agreement.check_dtypes(nj.Affine(), 4, draw(0, 6, 4))
        agreement.check_dtypes(nj.Affine(dtype=jnp.bfloat16), 4, draw(0, 6, 4), output=jnp.bfloat16)
        agreement.check_rounding(nj.Affine(), 16, draw(0, 64, 16))

    @parameterized.parameters(*BAD_INPUT)
    def test_rejects_input(self, fields, x, mask, value):
        agreement.check_rejects_input(self, nj.Affine(**fields), 4, x, mask, value)

    @parameterized.parameters(("axis", None), ("use_scale", "yes"), ("activation", 3))
    def test_rejects_field(self, field, value):
        pieces = ("Affine", field, value)
        agreement.check_rejects(self, pieces, nj.Affine, **{field: value})


class DynamicTanhTest(parameterized.TestCase):
    @parameterized.parameters(*zip(CASES, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.DynamicTanh, case, kind)

    @parameterized.parameters(*zip(CASES, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.DynamicTanh, case, kind)

    @parameterized.parameters(False, True)
    def test_gradients(self, masked):
        method, x, g = nj.DynamicTanh(), draw(0, 6, 3, 4), draw(1, 6, 3, 4)
        mask = ragged(2, *x.shape, share=0.6 if masked else 2)
        params, state = variables(method, 4)
        _, _, (dparams, dx) = run(method, params, state, x, mask=mask, cotangent=g)
        alpha, scale = (np.asarray(params.alpha), np.asarray(params.scale))
        tanh = np.tanh(alpha * x * mask)
        slope = g * scale * (1 - tanh**2) * mask
        expected = params._replace(
            alpha=(slope * x).sum(), scale=(g * tanh).sum((0, 1)), bias=g.sum((0, 1))
        )
        close((dx, dparams), (slope * alpha, expected), TOLERANCE["float32"])

    def test_initial_values(self):
        params, state = nj.DynamicTanh(alpha_init=0.25, param_dtype=jnp.bfloat16).init(KEY, 3)
        close(params.alpha.astype("float32"), np.float32(0.25), 0)
        chex.assert_type(jax.tree.leaves(params), "bfloat16")
        self.assertEqual(state, ())

    def test_saturates(self):
        x = np.array([[-1e4, 1e4]], "float32")
        method = nj.DynamicTanh()
        params, state = method.init(KEY, 2)
        y, _, grads = run(method, params, state, x, cotangent=np.ones_like(x))
        close(y, np.array([[-1, 1]], "float32"), 0)
        chex.assert_tree_all_finite(grads)

    def test_dtypes_and_rounding(self):
        agreement.check_dtypes(nj.DynamicTanh(), 4, draw(0, 6, 4))
        agreement.check_dtypes(
            nj.DynamicTanh(dtype=jnp.float32), 4, draw(0, 6, 4), output=jnp.float32
        )
        agreement.check_rounding(nj.DynamicTanh(), 16, draw(0, 64, 16))

    @parameterized.parameters(*BAD_INPUT)
    def test_rejects_input(self, fields, x, mask, value):
        agreement.check_rejects_input(self, nj.DynamicTanh(**fields), 4, x, mask, value)

    @parameterized.parameters(
        ("alpha_init", float("inf")), ("alpha_init", float("nan")), ("alpha_init", "0.5")
    )
    def test_rejects_field(self, field, value):
        pieces = ("DynamicTanh", field, value)
        agreement.check_rejects(self, pieces, nj.DynamicTanh, **{field: value})
