"""A mask equals dropping rows; what is masked reaches nothing; an empty mask is harmless."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from normjax.testing.measure import EXACT, jit
from normjax.testing.subject import Subject


def check(subject: Subject) -> None:
    """Values, states and gradients with masks, in float64."""
    with jax.enable_x64(True):
        params, state = subject.variables(jnp.float64)
        x, mask = subject.inputs(jnp.float64), subject.rows()
        weight = subject.inputs(jnp.float64, seed=4)
        spoilt = jnp.where(mask, x, jnp.nan)

        def loss(params, x, mask, weight):
            y, new = subject.apply(params, state, x, mask)
            z = y if mask is None else jnp.where(mask, y, 0)
            return jnp.sum(z * weight), (y, new)

        gradients = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        valid = lambda out: jax.tree.map(
            lambda a: jnp.where(mask, a, 0) if a.shape == x.shape else a, out
        )
        clean = gradients(params, x, mask, weight)
        chex.assert_trees_all_close(
            valid(gradients(params, spoilt, mask, weight)), valid(clean), **EXACT
        )
        chex.assert_tree_all_finite(clean)
        outside = jnp.where(mask, 0, clean[1][1])
        chex.assert_trees_all_equal(outside, jnp.zeros_like(outside))

        if subject.drops_rows:
            rows = np.flatnonzero(np.asarray(mask))
            few = gradients(params, x[rows], None, weight[rows])
            (_, (y, new)), (dparams, dx) = few
            chex.assert_trees_all_close(clean[0][1][0][rows], y, **EXACT)
            chex.assert_trees_all_close((clean[0][1][1], clean[1][0]), (new, dparams), **EXACT)
            chex.assert_trees_all_close(clean[1][1][rows], dx, **EXACT)

        whole = gradients(params, x, jnp.ones_like(mask), weight)
        chex.assert_trees_all_close(whole, gradients(params, x, None, weight), **EXACT)

        (_, (y, new)), (_, dx) = gradients(params, spoilt, jnp.zeros_like(mask), weight)
        chex.assert_tree_all_finite(y)
        chex.assert_trees_all_close(new, state, **EXACT)
        chex.assert_trees_all_equal(dx, jnp.zeros_like(x))

        if subject.masks_positions:
            everywhere = jnp.asarray(np.random.default_rng(6).random(subject.shape) < 0.6)
            holes = jnp.where(everywhere, x, jnp.nan)
            chex.assert_tree_all_finite(gradients(params, holes, everywhere, weight))
