"""A mask equals dropping rows; what is masked reaches nothing; an empty mask is harmless."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from normjax.testing.measure import EXACT, jit
from normjax.testing.subject import Subject, fill


def check(subject: Subject) -> None:
    """Values, states and gradients with masks, in float64."""
    with jax.enable_x64(True):
        params, state = subject.variables(jnp.float64)
        x, weight = (subject.inputs(jnp.float64, seed) for seed in (2, 4))
        shape = subject.shape if subject.masks_positions else subject.rows().shape
        mask = jnp.broadcast_to(subject.rows(), shape)  # one program for all masks
        spoilt, samples = jnp.where(mask, x, jnp.nan), subject.extras("sample", jnp.float64)
        lost = jax.tree.map(lambda a: _spoil(a, subject.rows()), samples)

        def loss(params, x, mask, weight, samples):
            y, new = subject.apply(params, state, x, mask, samples)
            return jnp.sum(fill(mask, y, 0) * weight), (y, new)

        gradients = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, (y, new)), (dparams, dx) = clean = gradients(params, x, mask, weight, samples)
        chex.assert_tree_all_finite(clean)
        chex.assert_trees_all_equal(jnp.where(mask, 0, dx), jnp.zeros_like(x))
        (_, (z, moved)), slopes = gradients(params, spoilt, mask, weight, lost)
        clean = fill(mask, y, 0), new, (dparams, dx)
        chex.assert_trees_all_close((fill(mask, z, 0), moved, slopes), clean, **EXACT)

        rows = np.flatnonzero(np.asarray(subject.rows()))
        if not subject.drops_rows:  # no mask is like one that is True
            rows, full = np.arange(len(x)), jnp.ones_like(mask)
            (_, (y, new)), (dparams, dx) = gradients(params, x, full, weight, samples)
        kept = jax.tree.map(lambda a: a[rows], samples)
        (_, (few, moved)), slopes = gradients(params, x[rows], None, weight[rows], kept)
        chex.assert_trees_all_close((few, moved), (y[rows], new), **EXACT)
        chex.assert_trees_all_close(slopes, (dparams, dx[rows]), **EXACT)

        (_, (y, new)), (_, dx) = gradients(params, spoilt, jnp.zeros_like(mask), weight, samples)
        chex.assert_tree_all_finite(y)
        chex.assert_trees_all_close(new, state, **EXACT)
        chex.assert_trees_all_equal(dx, jnp.zeros_like(x))

        if subject.masks_positions:
            holes = jnp.asarray(np.random.default_rng(6).random(subject.shape) < 0.6)
            spoilt = fill(holes, x, jnp.nan)
            chex.assert_tree_all_finite(gradients(params, spoilt, holes, weight, samples))


def _spoil(a, rows):
    """An input of samples that is NaN for those that are masked, if it can be."""
    rows = rows.reshape(-1, *(1,) * (a.ndim - 1))
    return fill(rows, a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a
