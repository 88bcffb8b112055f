"""Ghost."""

from itertools import cycle

import agreement
import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import vector_files
from absl.testing import parameterized
from agreement import TOLERANCE, close, draw, ragged, run, variables

import normjax as nj

KEY = jax.random.key(0)


class GhostTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("ghost_batch_norm"))
    def test_vectors(self, name):
        agreement.check_vectors(name)

    ORACLE = (
        dict(method=nj.BatchNorm(), groups=2),
        dict(method=nj.BatchNorm(axis=1, unbiased_running_var=True), groups=6),
        dict(method=nj.BatchNorm(running_average="debiased", use_bias=False), groups=3),
        dict(method=nj.BatchNorm(activation=jax.nn.relu), groups=3),
        dict(method=nj.BatchRenorm(r_max=1.3, d_max=0.2), groups=2),
        dict(method=nj.BatchRenorm(), groups=2),
        dict(method=nj.LayerNorm(reduction_axes=(0, 2)), groups=2),
        dict(method=nj.Ghost(method=nj.BatchNorm(), groups=2), groups=3),
    )

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.Ghost, dict(case, shape=(6, 4, 4), features=4), kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.Ghost, dict(case, shape=(6, 4, 4), features=4), kind)

    def test_evaluation_is_the_method(self):
        method = nj.Ghost(method=nj.BatchNorm(), groups=4)
        x, mask = draw(0, 5, 3, 4), ragged(1, 5, 3, 4)
        agreement.check_oracle(method, 4, x, mask=mask, train=False)
        params, state = variables(method, 4)
        ours = run(method, params, state, x, train=False)
        chex.assert_trees_all_equal(ours, run(nj.BatchNorm(), params, state, x, train=False))

    @hypothesis.settings(deadline=None, derandomize=True, max_examples=20)
    @hypothesis.given(
        seed=st.integers(0, 2**16),
        share=st.floats(0, 1),
        drawn=st.sampled_from([(6, 2, 3), (6, 1, 1), (3,), (1, 2, 1), ()]),
    )
    def test_any_mask(self, seed, share, drawn):
        shape = (6, 2, 3)
        mask = np.broadcast_to(ragged(seed, *drawn, share=share), shape)
        method = nj.Ghost(method=nj.BatchNorm(unbiased_running_var=True), groups=3)
        agreement.check_oracle(method, 3, draw(seed, *shape), mask=mask, dtype="float64")

    @parameterized.parameters((6, 1, 1), (1, 2, 3), (2, 1), (3,), ())
    def test_mask_broadcasts(self, *shape):
        method = nj.Ghost(method=nj.BatchNorm(), groups=3)
        agreement.check_oracle(method, 3, draw(0, 6, 2, 3), mask=ragged(5, *shape))

    @parameterized.parameters(nj.BatchNorm(), nj.BatchRenorm(), nj.InstanceNorm())
    def test_one_group_is_the_method(self, method):
        x = draw(0, 6, 3, 4)
        params, state = variables(method, 4)
        ours = run(nj.Ghost(method=method, groups=1), params, state, x, cotangent=x)
        theirs = run(method, params, state, x, cotangent=x)
        close(ours, theirs, TOLERANCE["float32"])

    def test_per_sample_methods_do_not_notice(self):
        method, x = nj.GroupNorm(num_groups=2), draw(0, 6, 3, 4)
        params, state = variables(method, 4)
        ours = run(nj.Ghost(method=method, groups=3), params, state, x, cotangent=x)
        close(ours, run(method, params, state, x, cotangent=x), TOLERANCE["float32"])

    def test_state_is_the_mean_of_the_groups(self):
        method, x = nj.BatchNorm(), draw(0, 6, 4)
        params, state = variables(method, 4)
        _, new, _ = run(nj.Ghost(method=method, groups=3), params, state, x)
        each = [run(method, params, state, part)[1] for part in np.split(x, 3)]
        expected = jax.tree.map(lambda *a: np.mean(a, axis=0), *each)
        close(new, expected, TOLERANCE["float32"])

    def test_chain_inside(self):
        inner = nj.chain(nj.BatchNorm(), nj.Affine())
        agreement.check_oracle(nj.Ghost(method=inner, groups=2), 4, draw(0, 6, 4))

    def test_groups_draw_apart(self):
        method, x = nj.Ghost(nj.GhostNoise(2), groups=2), np.tile(draw(0, 4, 3), (2, 1))
        params, state = method.init(KEY, 3)
        y, _ = method.apply(params, state, x, train=True, key=KEY)
        self.assertFalse(np.array_equal(y[:4], y[4:]))

    def test_group_with_nonfinite_input_keeps_its_share(self):
        inner = nj.BatchNorm(skip_nonfinite=True, momentum=0.5)
        method, x = nj.Ghost(method=inner, groups=2), draw(0, 6, 4)
        x[0] = np.nan
        params, state = variables(method, 4)
        y, new, _ = run(method, params, state, x)
        _, half, _ = run(inner, params, state, x[3:])
        expected = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, state, half)
        close(new, expected, TOLERANCE["float32"])
        chex.assert_tree_all_finite(y[3:])

    def test_dtypes(self):
        ghost = nj.Ghost(method=nj.BatchNorm(running_average="debiased"), groups=2)
        agreement.check_dtypes(ghost, 4, draw(0, 6, 4))
        ghost = nj.Ghost(method=nj.BatchNorm(dtype=jnp.bfloat16), groups=2)
        agreement.check_dtypes(ghost, 4, draw(0, 6, 4), output=jnp.bfloat16)

    def test_rounding(self):
        method = nj.Ghost(method=nj.BatchNorm(), groups=4)
        agreement.check_rounding(method, 16, 2 + draw(0, 64, 16))

    def test_large_offset(self):
        method = nj.Ghost(method=nj.BatchNorm(momentum=0.0), groups=2)
        x = (1e4 + draw(0, 4, 256, 3)).astype("float32")
        params, state = method.init(KEY, 3)
        _, new, _ = run(method, params, state, x)
        _, expected = oracles.apply(method, params, state, x, train=True)
        np.testing.assert_allclose(new.var, expected.var, rtol=agreement.OFFSET_TOLERANCE)

    @parameterized.parameters(
        (4, draw(0, 6, 4), None, "4 groups"),
        (2, np.float32(1), None, "()"),
        (2, draw(0, 6, 4).astype("complex64"), None, "complex64"),
        (2, draw(0, 6, 4), np.ones(6, bool), "(6,)"),
        (2, draw(0, 6, 5), None, "5"),
    )
    def test_rejects_input(self, groups, x, mask, value):
        method = nj.Ghost(method=nj.BatchNorm(), groups=groups)
        params, state = method.init(KEY, 4)
        apply = method.apply
        agreement.check_rejects(self, (value,), apply, params, state, x, train=True, mask=mask)

    @parameterized.parameters(
        dict(method=nj.BatchNorm(), groups=0),
        dict(method=nj.BatchNorm(), groups=-1),
        dict(method=nj.BatchNorm(), groups=2.0),
        dict(method="BatchNorm", groups=2),
        dict(method=None, groups=2),
        dict(method=nj.BatchNorm, groups=2),
    )
    def test_rejects_field(self, method, groups):
        value = groups if isinstance(method, nj.BatchNorm) else method
        agreement.check_rejects(self, ("Ghost", value), nj.Ghost, method=method, groups=groups)
