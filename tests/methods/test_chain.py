"""chain."""

from itertools import cycle

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from agreement import TOLERANCE, close, draw, run, variables

import normjax as nj

KEY = jax.random.key(0)


class ChainTest(parameterized.TestCase):
    ORACLE = (
        dict(methods=(nj.BatchNorm(),)),
        dict(methods=(nj.GroupNorm(num_groups=2, use_scale=False), nj.Affine())),
        dict(methods=(nj.BatchNorm(), nj.LayerNorm(), nj.BatchNorm(momentum=0.5))),
        dict(methods=(nj.DynamicTanh(), nj.Ghost(method=nj.BatchRenorm(), groups=3))),
        dict(methods=(nj.chain(nj.RMSNorm(), nj.Affine()), nj.BatchNorm())),
    )

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.Chain, dict(case, shape=(6, 3, 4), features=4), kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.Chain, dict(case, shape=(6, 3, 4), features=4), kind)

    def test_evaluation(self):
        method = nj.chain(nj.BatchNorm(), nj.LayerNorm())
        agreement.check_oracle(method, 4, draw(0, 6, 4), train=False)

    def test_names(self):
        method = nj.chain(nj.BatchNorm(), nj.Affine(), nj.BatchNorm())
        params, state = method.init(KEY, 4)
        names = {"BatchNorm_0", "Affine_1", "BatchNorm_2"}
        self.assertEqual(set(params), names)
        self.assertEqual(set(state), names)
        self.assertEqual(state["Affine_1"], ())

    def test_links_draw_their_own_parameters(self):
        link = nj.Affine(scale_init=jax.nn.initializers.normal())
        params, _ = nj.chain(link, link).init(KEY, 8)
        self.assertFalse(np.array_equal(params["Affine_0"].scale, params["Affine_1"].scale))

    def test_is_hashable_and_equal_by_value(self):
        first, second = (nj.chain(nj.BatchNorm(momentum=0.5), nj.RMSNorm()) for _ in range(2))
        self.assertEqual(first, second)
        self.assertEqual(hash(first), hash(second))
        self.assertNotEqual(first, nj.chain(nj.RMSNorm(), nj.BatchNorm(momentum=0.5)))

    def test_normalization_and_affine_are_the_whole(self):
        split = nj.chain(nj.BatchNorm(use_scale=False, use_bias=False), nj.Affine())
        whole, x = nj.BatchNorm(), draw(0, 6, 4)
        params, state = variables(whole, 4)
        y, new, (dparams, dx) = run(whole, params, state, x, cotangent=x)
        z, new_split, (dparams_split, dx_split) = run(
            split,
            {"BatchNorm_0": type(params)(None, None), "Affine_1": params},
            {"BatchNorm_0": state, "Affine_1": ()},
            x,
            cotangent=x,
        )
        ours = (z, new_split["BatchNorm_0"], dparams_split["Affine_1"], dx_split)
        close(ours, (y, new, dparams, dx), TOLERANCE["float32"])

    def test_dtypes(self):
        method = nj.chain(nj.BatchNorm(dtype=jnp.float32), nj.Affine())
        agreement.check_dtypes(method, 4, draw(0, 6, 4), output=jnp.float32)
        agreement.check_dtypes(nj.chain(nj.BatchNorm(), nj.LayerNorm()), 4, draw(0, 6, 4))

    @parameterized.parameters(
        (draw(0, 6, 5), None, "BatchNorm", "5"),
        (draw(0, 6, 4).astype("complex64"), None, "BatchNorm", "complex64"),
        (draw(0, 6, 4), np.ones(6, bool), "BatchNorm", "(6,)"),
    )
    def test_rejects_input(self, x, mask, *pieces):
        method = nj.chain(nj.BatchNorm(), nj.Affine())
        params, state = method.init(KEY, 4)
        apply = method.apply
        agreement.check_rejects(self, pieces, apply, params, state, x, train=True, mask=mask)

    def test_rejects_methods(self):
        agreement.check_rejects(self, ("Chain", "method"), nj.chain)
        pieces = ("Chain", "is not a method")
        agreement.check_rejects(self, pieces, nj.chain, nj.BatchNorm(), jax.nn.relu)
        agreement.check_rejects(self, (*pieces, "BatchNorm"), nj.chain, nj.BatchNorm)
