"""LayerNorm and RMSNorm."""

from itertools import cycle

import agreement
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import vector_files
from absl.testing import parameterized
from agreement import OFFSET_TOLERANCE, TOLERANCE, close, draw, ragged, run, variables

import normjax as nj

KEY = jax.random.key(0)
AXES = (
    dict(shape=(6, 5), features=5),
    dict(shape=(1, 2), features=2),
    dict(shape=(3, 1, 4), features=4),
    dict(shape=(2, 3, 4, 5), features=5, reduction_axes=(1, 2, 3)),
    dict(shape=(2, 3, 4, 5), features=(3, 4, 5), reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
    dict(shape=(2, 3, 4, 5), features=(3, 5), reduction_axes=(-2, -1), feature_axes=(1, -1)),
    dict(shape=(4, 3, 2), features=4, reduction_axes=1, feature_axes=0),
    dict(shape=(5, 4), features=4, reduction_axes=(0, 1), activation=jnp.tanh),
    dict(shape=(5, 4), features=4, use_scale=False, epsilon=1e-2),
)
BAD_INPUT = (
    (dict(reduction_axes=2), draw(0, 6, 4), None, "reduction_axes=2"),
    (dict(feature_axes=-3), draw(0, 6, 4), None, "feature_axes=-3"),
    (dict(reduction_axes=(1, -1)), draw(0, 6, 4), None, "reduction_axes=(1, -1)"),
    (dict(), draw(0, 6, 5), None, "5"),
    (dict(), np.float32(1), None, "()"),
    (dict(), draw(0, 6, 4).astype("complex64"), None, "complex64"),
    (dict(), np.ones((6, 4), bool), None, "bool"),
    (dict(), draw(0, 6, 4), np.ones(6, bool), "(6,)"),
    (dict(), draw(0, 6, 4), np.ones((1, 6, 4), bool), "(1, 6, 4)"),
)
BAD_FIELDS = (
    ("epsilon", -1.0),
    ("epsilon", "small"),
    ("reduction_axes", ()),
    ("feature_axes", 0.5),
    ("scale_init", 1.0),
    ("param_dtype", "int32"),
)


class LayerNormTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("layer_norm"))
    def test_vectors(self, name):
        agreement.check_vectors(name)

    ORACLE = (*AXES, dict(AXES[0], use_bias=False))

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.LayerNorm, case, kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.LayerNorm, case, kind)

    @hypothesis.settings(deadline=None, derandomize=True, max_examples=20)
    @hypothesis.given(seed=st.integers(0, 2**16), share=st.floats(0, 1), by=st.booleans())
    def test_any_mask(self, seed, share, by):
        method, shape = nj.LayerNorm(reduction_axes=(1, 2)), (3, 4, 2)
        mask = np.broadcast_to(ragged(seed, *(shape if by else (3, 4, 1)), share=share), shape)
        agreement.check_oracle(method, 2, draw(seed, *shape), mask=mask, dtype="float64")

    def test_masked_positions_are_as_if_dropped(self):
        method, keep = nj.LayerNorm(reduction_axes=(1, 2)), np.array([1, 0, 1, 1, 0, 1], bool)
        x = draw(0, 2, 6, 4)
        params, state = variables(method, 4)
        y, _, _ = run(method, params, state, x, mask=keep[:, None])
        z, _, _ = run(method, params, state, x[:, keep])
        close(y[:, keep], z, TOLERANCE["float32"])

    def test_dtypes_and_rounding(self):
        agreement.check_dtypes(nj.LayerNorm(), 4, draw(0, 6, 4))
        agreement.check_dtypes(
            nj.LayerNorm(dtype=jnp.bfloat16), 4, draw(0, 6, 4), output=jnp.bfloat16
        )
        agreement.check_dtypes(
            nj.LayerNorm(dtype=jnp.float32), 4, draw(0, 6, 4), output=jnp.float32
        )
        agreement.check_rounding(nj.LayerNorm(), 64, 2 + draw(0, 64, 64))

    @parameterized.parameters(dict(), dict(reduction_axes=(0, 1)))
    def test_large_offset(self, **fields):
        method = nj.LayerNorm(use_scale=False, use_bias=False, **fields)
        agreement.check_offset(method, (8, 512), method.reduction_axes)

    @parameterized.parameters(*BAD_INPUT)
    def test_rejects_input(self, fields, x, mask, value):
        agreement.check_rejects_input(self, nj.LayerNorm(**fields), 4, x, mask, value)

    @parameterized.parameters(*BAD_FIELDS, ("use_bias", "no"), ("bias_init", 0))
    def test_rejects_field(self, field, value):
        pieces = ("LayerNorm", field, value)
        agreement.check_rejects(self, pieces, nj.LayerNorm, **{field: value})


class RMSNormTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("rms_norm"))
    def test_vectors(self, name):
        agreement.check_vectors(name)

    @parameterized.parameters(*zip(AXES, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.RMSNorm, case, kind)

    @parameterized.parameters(*zip(AXES, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.RMSNorm, case, kind)

    def test_of_centred_input_is_layer_norm(self):
        x = draw(0, 5, 8, dtype="float64")
        x = (x - x.mean(-1, keepdims=True)).astype("float32")
        method = nj.RMSNorm()
        params, state = variables(method, 8)
        y, _, _ = run(method, params, state, x)
        z, _, _ = run(nj.LayerNorm(use_bias=False), params, state, x)
        close(y, z, TOLERANCE["float32"])

    def test_masked_positions_are_as_if_dropped(self):
        method, keep = nj.RMSNorm(reduction_axes=(1, 2)), np.array([1, 0, 1, 1, 0, 1], bool)
        x = draw(0, 2, 6, 4)
        params, state = variables(method, 4)
        y, _, _ = run(method, params, state, x, mask=keep[:, None])
        z, _, _ = run(method, params, state, x[:, keep])
        close(y[:, keep], z, TOLERANCE["float32"])

    def test_dtypes_and_rounding(self):
        agreement.check_dtypes(nj.RMSNorm(), 4, draw(0, 6, 4))
        agreement.check_dtypes(
            nj.RMSNorm(dtype=jnp.bfloat16), 4, draw(0, 6, 4), output=jnp.bfloat16
        )
        agreement.check_rounding(nj.RMSNorm(), 64, 2 + draw(0, 64, 64))

    def test_square_of_bfloat16_is_float32(self):
        method, x = nj.RMSNorm(dtype=jnp.float32), jnp.asarray(100 + draw(0, 4, 512), "bfloat16")
        params, state = method.init(KEY, 512)
        y, _, _ = run(method, params, state, x)
        exact, _ = oracles.apply(method, params, state, x, train=True)
        np.testing.assert_allclose(y, exact, rtol=OFFSET_TOLERANCE)

    @parameterized.parameters(*BAD_INPUT)
    def test_rejects_input(self, fields, x, mask, value):
        agreement.check_rejects_input(self, nj.RMSNorm(**fields), 4, x, mask, value)

    @parameterized.parameters(*BAD_FIELDS)
    def test_rejects_field(self, field, value):
        pieces = ("RMSNorm", field, value)
        agreement.check_rejects(self, pieces, nj.RMSNorm, **{field: value})
