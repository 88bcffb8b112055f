"""DecorrelatedBatchNorm, CholeskyBatchNorm, IterativeNorm, StochasticWhiteningBatchNorm."""

import dataclasses
from itertools import cycle

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vector_files
from absl.testing import parameterized
from agreement import close, draw, ragged

import normjax as nj
from normjax.core import roots

KEY = jax.random.key(0)
ZCA, CHOLESKY, STEPS = nj.DecorrelatedBatchNorm, nj.CholeskyBatchNorm, nj.IterativeNorm
LEARNT = nj.StochasticWhiteningBatchNorm
ROOTS = (ZCA, CHOLESKY, STEPS)
KINDS = ("iter_norm", "iter_norm_flex", "dbn", "dbn2", "swbn")
RECORDED = [name for kind in KINDS for name in vector_files.names(kind)]


def mixed(*shape, seed=0, dtype="float32"):
    """Normal numbers whose last axis is correlated."""
    mix = np.eye(shape[-1]) + 0.4 * draw(seed + 50, shape[-1], shape[-1], dtype="float64")
    return jnp.asarray(draw(seed, *shape, dtype="float64") @ mix, dtype)


def train(method, x, features=None, *, state=None, key=None, **inputs):
    """Output and state of one step from the start."""
    params, first = method.init(KEY, x.shape[-1] if features is None else features)
    state = first if state is None else state
    return method.apply(params, state, x, train=True, key=key, **inputs)


def covariance(y):
    rows = np.asarray(y, "float64").reshape(-1, y.shape[-1])
    return np.cov(rows, rowvar=False, bias=True)


def with_correlation(corr, repeats=1):
    """Rows of mean zero and variance one with exactly this correlation."""
    d = len(corr)
    rows = np.sqrt(d) * np.linalg.cholesky(corr).T
    return jnp.asarray(np.concatenate([rows, -rows] * repeats))


def ill(condition, d, seed=0):
    """A correlation matrix; its condition number is some `condition`."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    cov = (q * np.geomspace(1, condition, d)) @ q.T
    return cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov)))


class AgreementTest(parameterized.TestCase):
    @parameterized.parameters(*RECORDED)
    def test_vectors(self, name):
        agreement.check_vectors(name)

    @parameterized.parameters(*(name for name in RECORDED if name.startswith("iter_norm")))
    @pytest.mark.slow
    def test_vectors_in_the_coupled_form(self, name):
        agreement.check_vectors(name, iteration="cubic")

    ORACLE = (
        *(dict(make=one, shape=(24, 4), mask=(24, 1), features=4) for one in ROOTS),
        *(
            dict(make=one, shape=(6, 5, 4, 3), mask=(6, 5, 1, 1), features=(4, 3), axis=(2, -1))
            | dict(group_size=6, stored="matrix", momentum=0.5)
            for one in ROOTS
        ),
        *(
            dict(make=one, shape=(4, 5, 9), mask=(4, 1, 9), features=5, axis=1, group_size=3)
            | dict(last_group="smaller", shrinkage=0.2, unbiased_running_var=True)
            for one in ROOTS
        ),
        *(
            dict(make=one, shape=(9, 3, 4), mask=(9, 3, 1), features=4, group_size=2)
            | dict(shared_matrix=True, running_average="debiased", activation=jax.nn.relu)
            for one in ROOTS
        ),
        dict(make=ZCA, shape=(24, 4), mask=(24, 1), features=4, constant_statistics=True),
        dict(make=ZCA, shape=(24, 5), mask=(24, 1), features=5, group_size=3, stored="matrix")
        | dict(last_group="smaller"),
        dict(make=STEPS, shape=(24, 4), mask=(24, 1), features=4, iteration="quintic", steps=3),
        dict(make=STEPS, shape=(24, 4), mask=(24, 1), features=4, scaling="frobenius", steps=9),
        dict(make=STEPS, shape=(24, 4), mask=(24, 1), features=4, steps=0, use_bias=False),
        dict(make=LEARNT, shape=(24, 4), mask=(24, 1), features=4, alpha=0.1),
        dict(make=LEARNT, shape=(24, 4), mask=(24, 1), features=4, alpha=0.05)
        | dict(criterion="frobenius", group_size=3, last_group="smaller", momentum=0.9),
        dict(make=LEARNT, shape=(24, 4), mask=(24, 1), features=4, constant_statistics=True),
        dict(make=LEARNT, shape=(8, 4, 5), mask=(8, 1, 5), features=4, axis=1, half_life=2.0)
        | dict(form="covariance", shrinkage=0.1, activation=jax.nn.relu),
        dict(make=LEARNT, shape=(24, 4), mask=(24, 1), features=4, alpha=nj.Ramp(0, 0.4, 0, 4)),
    )

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    def test_oracle(self, case, kind):
        case = dict(case)
        agreement.check_case(case.pop("make"), case, kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        case = dict(case)
        agreement.check_case(case.pop("make"), case, kind)

    @parameterized.parameters(*(dict(case) for case in ORACLE[::3]))
    def test_evaluation_is_the_oracle(self, make, **case):
        agreement.check_case(make, case, ("float64", False), train=False)


class LimitsTest(parameterized.TestCase):
    def test_groups_of_one_feature_are_batch_norm(self):
        """For every number of steps: a variance over itself, one, is where they stay."""
        methods = [STEPS(group_size=1, steps=n) for n in range(10)]
        methods += [ZCA(group_size=1), CHOLESKY(group_size=1), nj.BatchNorm()]
        x, g = mixed(32, 4), draw(1, 32, 4)

        @jax.jit
        def run(x):
            pulled = (jax.vjp(lambda x, m=m: train(m, x), x, has_aux=True) for m in methods)
            every = ((y, back(g), state) for y, back, state in pulled)
            return [jax.tree.leaves(jax.tree.map(jnp.ravel, one)) for one in every]

        *found, plain = run(x)
        for one in found:
            close(one, plain, 2e-5)

    @parameterized.parameters("update", "covariance")
    def test_stochastic_whitening_at_rate_zero_is_batch_norm(self, form):
        x, g = mixed(32, 4), draw(1, 32, 4)
        method, plain = LEARNT(alpha=0.0, form=form, epsilon=1e-5), nj.BatchNorm()
        (y, back), (z, known) = (jax.vjp(lambda x, m=m: train(m, x)[0], x) for m in (method, plain))
        close(y, z, 2e-6)
        close(back(g)[0], known(g)[0], 5e-6)
        state, moved = train(method, x)[1], train(plain, x)[1]
        close((state.mean, state.var), (moved.mean, moved.var), 1e-6)

    @parameterized.parameters(1, 7)
    def test_coupled_and_published_forms_agree(self, steps):
        """In float64 to 1e-9; in float32 rounding of the published one is at 6e-4 after seven."""
        x, forms = mixed(64, 8), ("cubic", "published")
        for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-3 if steps == 7 else 1e-5)):
            with jax.enable_x64(dtype == "float64"):
                by = [STEPS(steps=steps, iteration=one) for one in forms]
                close(*(train(method, jnp.asarray(x, dtype))[0] for method in by), tolerance)

    @parameterized.parameters(
        ZCA(), CHOLESKY(), STEPS(steps=30), STEPS(steps=9, minimax_steps=4, scaling="power")
    )
    def test_the_output_is_white(self, method):
        close(covariance(train(method, mixed(64, 3, 8))[0]), np.eye(8), 2e-4)

    @parameterized.parameters(ZCA(), STEPS())
    def test_features_may_be_permuted(self, method):
        x, order = mixed(32, 6), np.array([3, 0, 5, 1, 4, 2])
        close(train(method, x[:, order])[0], train(method, x)[0][:, order], 2e-5)

    def test_the_symmetric_root_turns_with_the_input(self):
        with jax.enable_x64(True):
            x, (q, _) = mixed(32, 6, dtype="float64"), np.linalg.qr(draw(7, 6, 6, dtype="float64"))
            close(train(ZCA(), x @ q)[0], train(ZCA(), x)[0] @ q, 1e-10)

    def test_white_input_keeps_a_deviation_of_0_766_after_five_steps(self):
        x = with_correlation(np.eye(64))
        y, _ = train(STEPS(epsilon=0.0), x.astype("float32"))
        close(covariance(y), 0.766**2 * np.eye(64), 1e-3)
        y, _ = train(STEPS(epsilon=0.0, scaling="frobenius"), x.astype("float32"))
        close(covariance(y), np.eye(64), 3e-3)

    @parameterized.parameters(*ROOTS, LEARNT)
    def test_evaluation_by_the_batch_is_training(self, one):
        fields = {"alpha": 0.1} if one is LEARNT else {"group_size": 2}
        method, x = one(momentum=0.0, **fields), mixed(32, 4)
        params, _ = method.init(KEY, 4)
        y, state = train(method, x)
        close(method.apply(params, state, x, train=False)[0], y, 1e-5)

    @parameterized.parameters(
        ZCA(group_size=2),
        STEPS(group_size=3, last_group="smaller"),
        CHOLESKY(group_size=2, shared_matrix=True, axis=0),
        LEARNT(alpha=0.1, group_size=2),
    )
    def test_evaluation_is_a_linear_map(self, method):
        x = mixed(32, 4)
        turned = x.T if method.axis == 0 else x
        params = jax.tree.map(lambda a: a + 0.1 * jnp.arange(4.0), method.init(KEY, 4)[0])
        _, state = train(method, turned, 4)
        found, size = method.evaluation(params, state), method.group_size
        groups = [np.s_[i : i + size] for i in range(0, 4, size)]
        y = np.empty_like(x)
        for i, at in enumerate(groups):
            width = len(range(*at.indices(4)))
            one = lambda a, i=i: np.asarray(a[min(i, len(a) - 1)])
            matrix, mean = one(found.matrix)[:width, :width], one(found.mean)[:width]
            y[:, at] = (np.asarray(x)[:, at] - mean) @ matrix.T + np.asarray(params.bias)[at]
        z, _ = method.apply(params, state, turned, train=False)
        close(z.T if method.axis == 0 else z, y, 1e-5)

    @parameterized.parameters(
        ZCA(unbiased_running_var=True),
        STEPS(group_size=2, shared_matrix=True, stored="matrix"),
        LEARNT(alpha=0.1, unbiased_running_var=True),
    )
    def test_weights_count_like_repeated_rows(self, method):
        with jax.enable_x64(True):
            x, times = mixed(12, 4, dtype="float64"), np.array([1, 2, 0] * 4)
            y, state = train(method, x, weights=jnp.asarray(times, float)[:, None])
            z, known = train(method, jnp.repeat(x, times, axis=0))
            close(jnp.repeat(y, times, axis=0), z, 1e-10)
            close(state, known, 1e-6)

    def test_small_weights_weigh_as_large_ones(self):
        x, weights = mixed(12, 4), jnp.arange(1.0, 13)[:, None]
        y, state = train(STEPS(), x, weights=weights)
        z, known = train(STEPS(), x, weights=1e-3 * weights)
        chex.assert_trees_all_close((y, state), (z, known), atol=1e-5)

    @parameterized.parameters(ZCA, CHOLESKY, STEPS)
    def test_residual(self, one):
        steps = {"steps": 1} if one is STEPS else {}
        method = one(group_size=3, last_group="smaller", shrinkage=0.01, **steps)
        x = mixed(64, 5)
        _, state = method.init(KEY, 5)
        found = method.residual(state, method.observe(x))
        assert found.shape == (2, 3, 3)
        assert (jnp.abs(found).max() > 0.1) == (one is STEPS)
        more = STEPS(group_size=3, last_group="smaller", steps=20)
        assert jnp.abs(more.residual(state, more.observe(x))).max() < 1e-4


class ShuffleTest(parameterized.TestCase):
    def test_groups_are_those_of_permuted_features(self):
        x, key = mixed(64, 6), jax.random.key(3)
        y, _ = train(CHOLESKY(group_size=2, shuffle=True), x, key=key)
        order = jax.random.permutation(key, jnp.arange(6))
        z, _ = train(CHOLESKY(group_size=2), x[:, order])
        close(y[:, order], z, 2e-5)
        assert not np.allclose(y, train(CHOLESKY(group_size=2), x)[0], atol=1e-2)

    def test_evaluation_has_consecutive_groups(self):
        x, plain = mixed(64, 6), ZCA(group_size=2, momentum=0.0)
        method = dataclasses.replace(plain, shuffle=True)
        params, _ = method.init(KEY, 6)
        _, state = train(method, x, key=KEY)
        y, _ = method.apply(params, state, x, train=False)
        close(y, train(plain, x)[0], 2e-5)
        residual = method.residual(state, method.observe(x))
        assert residual.shape == (1, 6, 6) and jnp.abs(residual).max() < 1e-4

    def test_a_key_is_needed(self):
        with self.assertRaisesRegex(ValueError, "key=None"):
            train(ZCA(shuffle=True), mixed(8, 4))


class StochasticTest(parameterized.TestCase):
    def moved(self, method, x, steps, state=None):
        params, first = method.init(KEY, x.shape[-1])

        def step(state, _):
            return method.apply(params, state, x, train=True)[1], None

        first = jax.tree.map(lambda a: a.astype(x.dtype), first) if state is None else state
        return jax.jit(lambda s: jax.lax.scan(step, s, None, steps)[0])(first)

    def test_converges_to_the_inverse_root(self):
        with jax.enable_x64(True):
            corr = ill(30, 5)
            state = self.moved(LEARNT(alpha=0.2, epsilon=0.0), with_correlation(corr), 400)
            close(state.matrix[0], roots.zca(jnp.asarray(corr)), 1e-9)

    def test_the_frobenius_step_comes_nearer(self):
        x = with_correlation(ill(30, 5)).astype("float32")
        method = LEARNT(alpha=0.02, criterion="frobenius", epsilon=0.0)
        far = [
            np.linalg.norm(
                covariance(train(method, x, state=self.moved(method, x, n))[0]) - np.eye(5)
            )
            for n in (1, 50, 300)
        ]
        assert far[0] > 1.5 * far[1] > 2 * far[2]

    def test_partial_whitening_in_closed_form(self):
        with jax.enable_x64(True):
            corr = np.full((4, 4), 0.7) + 0.3 * np.eye(4)  # eigenvalues 3.1 and 0.3
            rate, steps = 1e-3, 340
            method, x = LEARNT(alpha=rate, epsilon=0.0), with_correlation(corr)
            state = self.moved(method, x, steps)
            white = state.matrix[0] @ corr @ state.matrix[0].T
            decay = np.exp(-2 * rate * steps)
            wanted = [c / (c - (c - 1) * decay) for c in (0.3, 0.3, 0.3, 3.1)]
            np.testing.assert_allclose(np.linalg.eigvalsh(white), wanted, rtol=1e-3)

    @parameterized.parameters((0.9, True), (1.1, False))
    def test_bound_of_the_rate(self, share, converges):
        with jax.enable_x64(True):
            corr = ill(4000, 6)
            values = np.linalg.eigvalsh(corr)
            bound = nj.largest_rate(values[-1] / values[0])
            method, root = LEARNT(alpha=share * bound, epsilon=0.0), roots.zca(jnp.asarray(corr))
            near = root + 1e-6 * (lambda a: a + a.T)(draw(2, 6, 6, dtype="float64"))
            x = with_correlation(corr)
            first = nj.Whitening(jnp.zeros(6), jnp.ones(6), matrix=near[None])
            far = jnp.abs(self.moved(method, x, 600, first).matrix[0] - root).max()
            assert (far < 1e-8) == converges, far

    def test_both_forms_agree_for_small_rates(self):
        x = mixed(64, 4)
        by = [
            self.moved(LEARNT(alpha=1e-3, form=form), x, 300) for form in ("update", "covariance")
        ]
        close(by[0].matrix[0], roots.zca(by[1].cov[0]), 1e-3)
        y, z = (
            train(LEARNT(alpha=1e-3, form=f), x, state=s)[0]
            for f, s in zip(("update", "covariance"), by, strict=True)
        )
        close(y, z, 2e-3)

    def test_half_life(self):
        method, x = LEARNT(half_life=20.0, form="covariance", epsilon=0.0), mixed(64, 3)
        state, corr = self.moved(method, x, 20), np.corrcoef(x, rowvar=False)
        close(state.cov[0], (np.eye(3) + corr) / 2, 2e-2)

    def test_uncorrelated_features_leave_the_matrix_alone(self):
        x = with_correlation(np.diag([1.0, 2, 3, 4])).astype("float32")
        for criterion in ("kl", "frobenius"):
            state = self.moved(LEARNT(alpha=0.1, criterion=criterion, epsilon=0.0), x, 5)
            close(state.matrix[0], np.eye(4), 1e-5)

    def test_the_step_of_the_matrix_is_invisible_to_grad(self):
        """The gradient is batch norm's, of the cotangent times the transpose of the new matrix."""
        x, g, method = mixed(64, 4), draw(1, 64, 4), LEARNT(alpha=0.3)
        y, back = jax.vjp(lambda x: train(method, x)[0], x)
        matrix = train(method, x)[1].matrix[0]
        z, known = jax.vjp(lambda x: train(nj.BatchNorm(), x)[0], x)
        close(y, z @ matrix.T, 1e-5)
        close(back(g)[0], known(g @ matrix)[0], 1e-5)


class SafetyTest(parameterized.TestCase):
    METHODS = (
        ZCA(),
        CHOLESKY(),
        STEPS(steps=20),
        STEPS(steps=7, minimax_steps=4, scaling="power"),
        LEARNT(alpha=0.1),
    )

    @parameterized.parameters(*METHODS)
    def test_derivatives_are_finite(self, method):
        """Of order one and two; for a constant, white input and fewer samples than features."""
        few = jnp.tile(mixed(3, 6), (4, 1))
        inputs = jnp.full((12, 6), 3.0), with_correlation(np.eye(6)).astype("float32"), few
        loss = lambda x: jnp.sum(jnp.sin(train(method, x)[0]))
        run = jax.jit(lambda x, d: (train(method, x), jax.jvp(jax.grad(loss), (x,), (d,))))
        for x in inputs:
            chex.assert_tree_all_finite(run(x, mixed(12, 6, seed=5)))

    @parameterized.parameters(*(one(running_average="debiased") for one in (*ROOTS, LEARNT)))
    def test_a_batch_without_samples_leaves_the_state(self, method):
        x = mixed(8, 4)
        _, state = train(method, x)
        y, moved = train(method, x * jnp.nan, state=state, mask=jnp.zeros((8, 1), bool))
        chex.assert_tree_all_finite(y)
        chex.assert_trees_all_equal(moved, state)

    @parameterized.parameters(*ROOTS, LEARNT)
    def test_groups_that_are_not_finite_leave_their_statistics(self, one):
        """A number that is not finite, and one whose square is not: its mean is."""
        method = one(group_size=2, skip_nonfinite=True)
        x = mixed(8, 4)
        _, state = train(method, mixed(8, 4, seed=1))
        _, known = train(method, x, state=state)
        halves = lambda old, new: jnp.concatenate([old[: len(old) // 2], new[len(old) // 2 :]])
        for spoilt in (jnp.nan, 1e25):
            _, moved = train(method, x.at[0, 1].set(spoilt), state=state)
            close(moved, jax.tree.map(halves, state, known), 1e-6)

    @parameterized.parameters(True, False)
    def test_ghost_batches(self, training):
        x, inner = mixed(32, 4), STEPS(group_size=2)
        method = nj.Ghost(inner, groups=2)
        params, state = method.init(KEY, 4)
        y, moved = method.apply(params, state, x, train=training)
        if training:
            parts, states = zip(*(train(inner, half) for half in (x[:16], x[16:])), strict=True)
            close(y, jnp.concatenate(parts), 1e-6)
            close(moved.cov, (states[0].cov + states[1].cov) / 2, 1e-6)
        else:
            close(y, inner.apply(params, state, x, train=False)[0], 1e-6)

    @parameterized.product(second=(nj.Affine(), nj.LayerNorm()), training=(True, False))
    def test_chain_is_one_after_the_other(self, second, training):
        x, first = mixed(32, 4), ZCA(group_size=2, use_scale=False, use_bias=False)
        method = nj.chain(first, second)
        params, state = method.init(KEY, 4)
        y, _ = method.apply(params, state, x, train=training)
        z, _ = first.apply(*first.init(KEY, 4), x, train=training)
        z, _ = second.apply(*second.init(KEY, 4), z, train=training)
        close(y, z, 1e-5)

    def test_conditioned_is_the_norm_and_then_the_classes(self):
        x, labels = mixed(32, 4), jnp.arange(32) % 3
        method = nj.Conditioned(ZCA(), nj.ClassAffine(3))
        params, state = method.init(KEY, 4)
        for training in (True, False):
            y, _ = method.apply(params, state, x, train=training, condition=labels)
            z, _ = ZCA().apply(params.norm, state, x, train=training)
            rows = params.condition.scale[labels], params.condition.bias[labels]
            close(y, z * rows[0] + rows[1], 1e-5)

    def test_statistics_of_branches(self):
        x, method = mixed(32, 4), nj.MultiStats(ZCA(), 2)
        params, state = method.init(KEY, 4)
        _, moved = method.apply(params, state, x, train=True, branch=1)
        np.testing.assert_array_equal(moved.cov[0], state.cov[0])
        _, known = train(ZCA(), x)
        close(moved.cov[1], known.cov, 1e-6)
        y, _ = method.apply(params, moved, x, train=False, branch=1)
        close(y, ZCA().apply(params, known, x, train=False)[0], 1e-6)

    def test_pooled_covariances_are_those_of_the_whole(self):
        x, method = mixed(32, 4), ZCA(group_size=2)
        seen = nj.pool(method.observe(x[:10]), method.observe(x[10:]))
        assert isinstance(seen, nj.Covariances)
        close(seen, method.observe(x), 1e-6)

    @parameterized.parameters(
        (lambda: ZCA(group_size=0), "group_size=0"),
        (lambda: ZCA(shared_matrix=True, last_group="smaller"), "groups of one size"),
        (lambda: ZCA(shuffle=True, stored="matrix"), "shuffle=True"),
        (lambda: ZCA(shuffle=True, shared_matrix=True), "shuffle=True"),
        (lambda: ZCA(shuffle=True, last_group="smaller"), "shuffle=True"),
        (lambda: ZCA(stored="matrix", unbiased_running_var=True), "keeps no covariance"),
        (lambda: ZCA(shrinkage=1.5), "shrinkage=1.5"),
        (lambda: ZCA(running_average="pooled"), "pool"),
        (lambda: STEPS(steps=-1), "steps=-1"),
        (lambda: STEPS(steps=2.5), "steps=2.5"),
        (lambda: STEPS(iteration="published", steps=8), "beyond 7"),
        (lambda: STEPS(iteration="published", scaling="frobenius"), "scaling='trace'"),
        (lambda: STEPS(iteration="published", minimax_steps=2), "no minimax_steps"),
        (lambda: STEPS(minimax_steps=6), "more than steps=5"),
        (lambda: STEPS(condition=0.5), "condition=0.5"),
        (lambda: LEARNT(alpha=-0.1), "alpha=-0.1"),
        (lambda: LEARNT(alpha=1.0), "does not converge"),
        (lambda: LEARNT(alpha=1.01 * nj.largest_rate(50), condition=50), "does not converge"),
        (lambda: LEARNT(alpha=nj.largest_rate(50), condition=50), "does not converge"),
        (lambda: LEARNT(condition=0.5), "condition=0.5"),
        (lambda: LEARNT(alpha=0.1, half_life=3.0), "give one of them"),
        (lambda: LEARNT(half_life=0), "half_life=0"),
        (lambda: LEARNT(form="covariance", criterion="frobenius"), "criterion='kl'"),
        (lambda: LEARNT(form="covariance", alpha=0.6), "at most 1/2"),
    )
    def test_fields(self, make, words):
        with self.assertRaisesRegex(ValueError, words):
            make()

    def test_rates_below_the_bound_are_taken(self):
        LEARNT(alpha=0.99 * nj.largest_rate(50), condition=50)
        LEARNT(alpha=0.5, form="covariance", condition=1e6)

    @parameterized.parameters(
        (ZCA(group_size=3), (8, 4), {}, "does not divide 4 features"),
        (ZCA(), (1, 4), {}, "single value"),
        (ZCA(), (4,), {}, "no axis"),
        (ZCA(), (8, 4), {"mask": np.ones((8, 4), bool)}, "vary along the features"),
        (LEARNT(), (8, 4), {"weights": np.ones((8, 4))}, "vary along the features"),
        (STEPS(), (8, 4), {"weights": -np.ones((8, 1))}, "negative"),
        (STEPS(), (8, 4), {"segment_ids": np.zeros((8, 1), int)}, "takes no input"),
    )
    def test_inputs(self, method, shape, inputs, words):
        with self.assertRaisesRegex((ValueError, TypeError), words):
            train(method, jnp.ones(shape), **inputs)

    def test_complex_input(self):
        with self.assertRaisesRegex(TypeError, "complex"):
            train(ZCA(), jnp.ones((8, 4), complex))

    @parameterized.parameters(
        (ZCA(group_size=2), ZCA(), "`cov`"),
        (ZCA(stored="matrix"), ZCA(), "`cov`"),
        (LEARNT(form="covariance"), LEARNT(), "`cov`"),
        (ZCA(), ZCA(axis=0), "features"),
        (ZCA(running_average="debiased"), ZCA(), "`count`"),
    )
    def test_a_state_of_another_configuration(self, made, used, words):
        params, state = made.init(KEY, 4)
        with self.assertRaisesRegex(ValueError, words):
            used.apply(params, state, mixed(8, 4), train=True)


class SamplesTest(parameterized.TestCase):
    ORACLE = (
        dict(shape=(5, 7, 3), mask=(5, 1, 1)),
        dict(shape=(6, 7, 3), mask=(6, 1, 1), group_size=3, steps=5, epsilon=0.5),
        dict(shape=(6, 16), mask=(6, 1), group_size=2, epsilon=0.1, activation=jax.nn.relu),
        dict(shape=(6, 7, 3), mask=(1, 7, 1), group_size=3),
        dict(shape=(4, 3, 5, 2), mask=(1, 3, 5, 2), steps=0),
    )

    @parameterized.product(case=ORACLE, kind=agreement.KINDS)
    def test_oracle(self, case, kind):
        agreement.check_case(nj.SampleWhitening, dict(case, features=case["shape"][-1]), kind)

    def test_masked_samples_are_as_if_dropped(self):
        x, keep = jnp.asarray(draw(0, 6, 7, 3)), ragged(1, 6)
        spoilt = jnp.where(keep[:, None, None], x, jnp.nan)
        for method in (nj.SampleWhitening(), nj.SampleWhitening(steps=5)):
            y, _ = train(method, spoilt, mask=keep[:, None, None])
            close(y[keep], train(method, x[keep])[0], 2e-5)
            close(y[~keep], jnp.zeros((2, 7, 3)), 1e-6)

    def test_samples_become_uncorrelated_and_evaluation_is_training(self):
        x, method = mixed(40, 8).T, nj.SampleWhitening(group_size=4)
        y, _ = train(method, x)
        for group in (y[:4], y[4:]):
            close(covariance(group.T), np.eye(4), 1e-3)
        np.testing.assert_array_equal(y, method.apply((), (), x, train=False)[0])

    def test_steps_come_to_the_root(self):
        x = jnp.asarray(draw(0, 4, 64))
        close(*(train(nj.SampleWhitening(steps=n), x)[0] for n in (None, 20)), 2e-5)

    def test_derivatives_of_equal_samples_are_finite(self):
        x, along = jnp.tile(draw(0, 1, 9), (4, 1)), draw(1, 4, 9)
        for method in (nj.SampleWhitening(), nj.SampleWhitening(steps=5)):
            gradient = jax.grad(lambda x, m=method: jnp.sum(jnp.sin(train(m, x)[0])))
            chex.assert_tree_all_finite((train(method, x), jax.jvp(gradient, (x,), (along,))))

    @parameterized.parameters(None, 4)
    def test_empty_batch(self, size):
        y, _ = train(nj.SampleWhitening(group_size=size), jnp.ones((0, 3, 2), "bfloat16"))
        chex.assert_shape(y, (0, 3, 2))
        chex.assert_type(y, "bfloat16")

    @parameterized.parameters(
        ((6, 8), {}, "does not divide a batch of 6"),
        ((8, 1), {}, "single values"),
        ((8,), {}, "no samples of features"),
        ((8, 5), {"mask": np.ones((8, 5), bool)}, "neither of whole samples"),
    )
    def test_inputs(self, shape, inputs, words):
        with self.assertRaisesRegex(ValueError, words):
            train(nj.SampleWhitening(group_size=4), jnp.ones(shape), features=1, **inputs)
