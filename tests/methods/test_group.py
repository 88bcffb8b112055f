"""GroupNorm and InstanceNorm."""

from itertools import cycle

import agreement
import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vector_files
from absl.testing import parameterized
from agreement import TOLERANCE, close, draw, ragged, run, variables

import normjax as nj

KEY = jax.random.key(0)
KEPT = np.array([1, 0, 1, 1, 0, 1], bool)
BAD_INPUT = (
    (dict(), draw(0, 2, 3, 5), None, "5"),
    (dict(), np.float32(1), None, "()"),
    (dict(), draw(0, 2, 3, 4).astype("complex64"), None, "complex64"),
    (dict(), draw(0, 2, 3, 4), np.ones(3, bool), "(3,)"),
    (dict(), draw(0, 2, 3, 4), np.ones((2, 3), bool), "(2, 3)"),
)


class GroupNormTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("group_norm"))
    def test_vectors(self, name):
        agreement.check_vectors(name)

    ORACLE = (
        dict(shape=(3, 6), features=6, num_groups=2),
        dict(shape=(1, 2, 4), features=4, num_groups=4, use_bias=False, epsilon=0.01),
        dict(shape=(2, 3, 1, 6), features=6, num_groups=None, group_size=2, epsilon=1e-3),
        dict(shape=(2, 3, 4, 6), features=6, num_groups=3, reduction_axes=(2, 3)),
        dict(shape=(2, 3, 6), features=6, num_groups=3, reduction_axes=-1, use_scale=False),
        dict(shape=(2, 3, 6), features=6, num_groups=1, reduction_axes=(0, 2)),
        dict(shape=(2, 3, 4), features=4, num_groups=2, activation=jax.nn.silu),
        dict(shape=(6,), features=6, num_groups=3),
    )

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.GroupNorm, case, kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.GroupNorm, case, kind)

    @hypothesis.settings(deadline=None, derandomize=True, max_examples=20)
    @hypothesis.given(
        seed=st.integers(0, 2**16),
        share=st.floats(0, 1),
        drawn=st.sampled_from([(3, 2, 4), (3, 2, 1), (2, 1), (4,), (3, 1, 1)]),
    )
    def test_any_mask(self, seed, share, drawn):
        shape = (3, 2, 4)
        mask = np.broadcast_to(ragged(seed, *drawn, share=share), shape)
        method, x = nj.GroupNorm(num_groups=2), draw(seed, *shape)
        agreement.check_oracle(method, 4, x, mask=mask, dtype="float64")

    @parameterized.parameters((3, 2, 1), (2, 1), (4,), (3, 1, 4), (1, 1, 1), ())
    def test_mask_broadcasts(self, *shape):
        mask = ragged(2, *shape)
        agreement.check_oracle(nj.GroupNorm(num_groups=2), 4, draw(0, 3, 2, 4), mask=mask)

    def test_masked_positions_are_as_if_dropped(self):
        method, x = nj.GroupNorm(num_groups=2), draw(0, 2, 6, 4)
        params, state = variables(method, 4)
        y, _, _ = run(method, params, state, x, mask=KEPT[:, None])
        z, _, _ = run(method, params, state, x[:, KEPT])
        close(y[:, KEPT], z, TOLERANCE["float32"])

    @parameterized.parameters(
        (nj.GroupNorm(num_groups=1), nj.LayerNorm(reduction_axes=(1, 2, 3))),
        (nj.GroupNorm(num_groups=5), nj.InstanceNorm()),
        (nj.GroupNorm(num_groups=None, group_size=1), nj.InstanceNorm()),
        (nj.GroupNorm(num_groups=1, reduction_axes=-1), nj.LayerNorm()),
        (nj.GroupNorm(num_groups=5, reduction_axes=(0, 1, 2, 3)), nj.BatchNorm(epsilon=1e-6)),
    )
    def test_limits(self, method, limit):
        x = draw(0, 2, 3, 4, 5)
        params, state = variables(method, 5)
        y, _, grads = run(method, params, state, x, cotangent=x)
        z, _, expected = run(limit, params, limit.init(KEY, 5)[1], x, cotangent=x)
        close((y, grads), (z, expected), TOLERANCE["float32"])

    def test_dtypes_and_rounding(self):
        agreement.check_dtypes(nj.GroupNorm(num_groups=2), 4, draw(0, 6, 3, 4))
        agreement.check_dtypes(
            nj.GroupNorm(num_groups=2, dtype=jnp.float32), 4, draw(0, 6, 4), output=jnp.float32
        )
        agreement.check_rounding(nj.GroupNorm(num_groups=4), 16, 2 + draw(0, 4, 16, 16))

    def test_large_offset(self):
        method = nj.GroupNorm(num_groups=1, use_scale=False, use_bias=False)
        agreement.check_offset(method, (2, 512, 4), (1, 2))

    @parameterized.parameters(
        *BAD_INPUT,
        (dict(reduction_axes=3), draw(0, 2, 3, 4), None, "reduction_axes=3"),
        (dict(reduction_axes=1), draw(0, 2, 3, 4), None, "reduction_axes=1"),
        (dict(reduction_axes=(0, 1, 1)), draw(0, 2, 3, 4), None, "(0, 1, 1)"),
    )
    def test_rejects_input(self, fields, x, mask, value):
        method = nj.GroupNorm(num_groups=2, **fields)
        agreement.check_rejects_input(self, method, 4, x, mask, value)

    @parameterized.parameters(
        (dict(num_groups=3), 8, "num_groups=3"),
        (dict(num_groups=16), 8, "num_groups=16"),
        (dict(), 48, "num_groups=32"),
        (dict(num_groups=None, group_size=3), 8, "group_size=3"),
        (dict(num_groups=None, group_size=16), 8, "group_size=16"),
        (dict(num_groups=2), (3, 4), "(3, 4)"),
        (dict(num_groups=2), 0, "0"),
    )
    def test_rejects_channels(self, fields, channels, value):
        method = nj.GroupNorm(**fields)
        agreement.check_rejects(self, ("GroupNorm", value), method.init, KEY, channels)

    @parameterized.parameters(
        (dict(num_groups=0), "num_groups=0"),
        (dict(num_groups=-2), "num_groups=-2"),
        (dict(num_groups=2.0), "num_groups=2.0"),
        (dict(num_groups=None, group_size=0), "group_size=0"),
        (dict(num_groups=None, group_size=-1), "group_size=-1"),
        (dict(num_groups=None), "num_groups=None"),
        (dict(group_size=4), "group_size=4"),
        (dict(epsilon=-1.0), "epsilon=-1.0"),
    )
    def test_rejects_field(self, fields, value):
        agreement.check_rejects(self, ("GroupNorm", value), nj.GroupNorm, **fields)


class InstanceNormTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("instance_norm"))
    def test_vectors(self, name):
        agreement.check_vectors(name)

    ORACLE = (
        dict(shape=(3, 5, 4), features=4),
        dict(shape=(1, 2, 1), features=1),
        dict(shape=(2, 3, 4, 5), features=3, feature_axes=1, use_bias=False),
        dict(shape=(2, 3, 4, 5), features=(3, 5), feature_axes=(1, -1), use_scale=False),
        dict(shape=(2, 3, 4), features=4, activation=jax.nn.relu, epsilon=1e-3),
    )

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.InstanceNorm, case, kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.InstanceNorm, case, kind)

    def test_masked_positions_are_as_if_dropped(self):
        method, x = nj.InstanceNorm(), draw(0, 2, 6, 4)
        params, state = variables(method, 4)
        y, _, _ = run(method, params, state, x, mask=KEPT[:, None])
        z, _, _ = run(method, params, state, x[:, KEPT])
        close(y[:, KEPT], z, TOLERANCE["float32"])

    def test_is_a_ghost_batch_norm_per_sample(self):
        x = draw(0, 3, 4, 5)
        params, state = variables(nj.BatchNorm(), 5)
        ghost = nj.Ghost(method=nj.BatchNorm(epsilon=1e-6), groups=3)
        y, _, grads = run(nj.InstanceNorm(), params, (), x, cotangent=x)
        z, _, expected = run(ghost, params, state, x, cotangent=x)
        close((y, grads), (z, expected), TOLERANCE["float32"])

    def test_single_position_is_the_bias_in_evaluation(self):
        x = draw(0, 3, 1, 5)
        params, state = variables(nj.InstanceNorm(), 5)
        y, _, grads = run(nj.InstanceNorm(), params, state, x, cotangent=x, train=False)
        close(y, np.broadcast_to(params.bias, y.shape), 0)
        chex.assert_tree_all_finite(grads)

    def test_dtypes_and_rounding(self):
        agreement.check_dtypes(nj.InstanceNorm(), 4, draw(0, 6, 3, 4))
        agreement.check_dtypes(
            nj.InstanceNorm(dtype=jnp.bfloat16), 4, draw(0, 6, 3, 4), output=jnp.bfloat16
        )
        agreement.check_rounding(nj.InstanceNorm(), 16, 2 + draw(0, 4, 16, 16))

    def test_large_offset(self):
        method = nj.InstanceNorm(use_scale=False, use_bias=False)
        agreement.check_offset(method, (2, 2048, 3), 1)

    @parameterized.parameters(
        *BAD_INPUT,
        (dict(), draw(0, 3, 4), None, "(3, 4)"),
        (dict(feature_axes=0), draw(0, 4, 3, 2), None, "feature_axes=0"),
        (dict(feature_axes=3), draw(0, 2, 3, 4), None, "feature_axes=3"),
    )
    def test_rejects_input(self, fields, x, mask, value):
        agreement.check_rejects_input(self, nj.InstanceNorm(**fields), 4, x, mask, value)

    @parameterized.parameters(("epsilon", -1.0), ("feature_axes", None), ("use_scale", 1))
    def test_rejects_field(self, field, value):
        pieces = ("InstanceNorm", field, value)
        agreement.check_rejects(self, pieces, nj.InstanceNorm, **{field: value})
