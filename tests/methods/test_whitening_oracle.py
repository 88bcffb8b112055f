"""The oracles of the whitening norms against finite differences, batch norm and by hand."""

import dataclasses

import numpy as np
import oracles
from absl.testing import parameterized
from methods.whitening_oracle import Whitened
from oracles import Params, close, draw, params_for, running_for

import normjax as nj

EXACT = (nj.DecorrelatedBatchNorm, nj.CholeskyBatchNorm)
BY_MATRIX = (*EXACT, nj.IterativeNorm)
LEARNT = nj.StochasticWhiteningBatchNorm


def stored_of(method):
    """The field of the state that holds matrices."""
    if isinstance(method, LEARNT):
        return "matrix" if method.form == "update" else "cov"
    return {"matrix": "matrix", "covariance": "cov"}[method.stored]


def state_for(method, *blocks, count=None):
    """Random statistics for groups of these widths."""
    features, widest = sum(blocks), max(blocks)
    stored = np.zeros((len(blocks), widest, widest))
    for i, width in enumerate(blocks):
        root = np.eye(width) + 0.2 * draw(20 + i, width, width)
        stored[i, :width, :width] = root @ root.T
    var = 0.5 + draw(4, features) ** 2 if isinstance(method, LEARNT) else None
    return Whitened(draw(3, features), var, count=count, **{stored_of(method): stored})


def correlated(*shape):
    return draw(0, *shape) @ (np.eye(shape[-1]) + 0.3 * draw(9, shape[-1], shape[-1]))


def train(method, x, *blocks, params=None, mask=None, count=None):
    state, params = state_for(method, *blocks, count=count), params or Params()
    return oracles.apply(method, params, state, x, train=True, mask=mask)


def covariance(rows):
    return np.cov(rows, rowvar=False, bias=True).reshape(2 * rows.shape[-1:])


class GradientsTest(parameterized.TestCase):
    @parameterized.parameters(
        *((one(), (4,)) for one in BY_MATRIX),
        *((one(group_size=2, shrinkage=0.3, axis=1), (2, 2)) for one in BY_MATRIX),
        *((one(group_size=3, last_group="smaller"), (3, 1)) for one in BY_MATRIX),
        *((one(group_size=2, shared_matrix=True), (2,)) for one in BY_MATRIX),
        *((one(group_size=6, axis=(1, -1)), (6, 6)) for one in BY_MATRIX),
        (nj.IterativeNorm(iteration="quintic", steps=3), (4,)),
        (nj.IterativeNorm(iteration="quintic", scaling="frobenius", steps=4), (4,)),
        (nj.IterativeNorm(scaling="frobenius", shrinkage=0.1, steps=1), (4,)),
        (nj.IterativeNorm(iteration="published", steps=0), (4,)),
        # At alpha = 0 the matrix is a constant of finite differences too.
        (LEARNT(alpha=0.0), (4,)),
        (LEARNT(alpha=0.0, group_size=3, last_group="smaller", axis=1), (3, 1)),
        (LEARNT(alpha=0.0, group_size=2, form="covariance"), (2, 2)),
    )
    def test_central_differences_with_mask(self, method, blocks):
        shape = {-1: (8, 5, 4), 1: (8, 4, 5), (1, -1): (8, 3, 5, 4)}[method.axis]
        x, axes = draw(0, *shape), oracles.as_axes(method.axis, len(shape))
        mask = np.random.default_rng(2).random(shape).mean(axes, keepdims=True) < 0.6
        params = params_for(*(shape[i] for i in axes))
        oracles.check_slope(method, params, state_for(method, *blocks), x, mask)

    @parameterized.parameters(*BY_MATRIX)
    def test_at_equal_eigenvalues(self, one):
        """Rows whose covariance is a multiple of the identity."""
        method, x = one(), np.concatenate([2 * np.eye(4), -2 * np.eye(4)])
        oracles.check_slope(method, params_for(4), state_for(method, 4), x, np.array(True))

    @parameterized.parameters(*BY_MATRIX, LEARNT)
    def test_constant_statistics(self, one):
        """The gradient goes through the last product alone."""
        method, x, g = one(constant_statistics=True), correlated(9, 4), draw(1, 9, 4)
        state, params = state_for(method, 4), params_for(4)
        dx, _, _ = oracles.gradients(method, params, state, x, g)
        y, _ = train(one(), x, 4)
        linear, *_ = np.linalg.lstsq(x - x.mean(0), y, rcond=None)
        close(dx, g * params.scale @ linear.T)


class WhiteningTest(parameterized.TestCase):
    @parameterized.product(one=EXACT, shared=(False, True))
    def test_the_output_is_white(self, one, shared):
        method, x = one(epsilon=0.0, group_size=2, shared_matrix=shared), correlated(9, 4)
        y, _ = train(method, x, *((2,) if shared else (2, 2)))
        groups = [y.reshape(-1, 2)] if shared else [y[:, :2], y[:, 2:]]
        for rows in groups:
            close(rows.mean(0), 0)
            close(covariance(rows), np.eye(2))

    @parameterized.parameters(*EXACT)
    def test_shrinkage_is_towards_a_multiple_of_the_identity(self, one):
        x = correlated(9, 4)
        y, _ = train(one(epsilon=0.0, shrinkage=0.1), x, 4)
        root, *_ = np.linalg.lstsq(x - x.mean(0), y, rcond=None)
        shrunk = 0.9 * covariance(x) + 0.1 * x.var(0).mean() * np.eye(4)
        close(root.T @ shrunk @ root, np.eye(4))

    @parameterized.parameters(*BY_MATRIX, LEARNT)
    def test_several_axes_are_flattened_in_order(self, one):
        x, params = draw(0, 8, 3, 5, 2), params_for(6)
        rows = x.transpose(0, 2, 1, 3).reshape(40, 6)
        z, expected = train(one(group_size=2), rows, 2, 2, 2, params=params)
        y, new = train(one(group_size=2, axis=(-1, 1)), x, 2, 2, 2, params=params)
        close(y.transpose(0, 2, 1, 3).reshape(40, 6), z)
        for name in ("mean", stored_of(one())):
            close(getattr(new, name), getattr(expected, name))

    @parameterized.parameters(("cubic", 40), ("quintic", 20))
    def test_many_steps_are_decorrelation(self, iteration, steps):
        x = correlated(9, 4)
        y, _ = train(nj.IterativeNorm(iteration=iteration, steps=steps), x, 4)
        close(y, train(nj.DecorrelatedBatchNorm(), x, 4)[0])

    @parameterized.product(scaling=("trace", "frobenius"), iteration=("cubic", "quintic"))
    def test_steps_are_those_of_matrices(self, scaling, iteration):
        x = correlated(9, 4)
        method = nj.IterativeNorm(scaling=scaling, iteration=iteration, steps=3)
        c, eye = x - x.mean(0), np.eye(4)
        a = covariance(x) + method.epsilon * eye
        size, p = np.trace(a) if scaling == "trace" else np.linalg.norm(a), eye
        for _ in range(3):
            m = p @ p @ a / size
            cubic, quintic = (3 * eye - m) / 2, (15 * eye - 10 * m + 3 * m @ m) / 8
            p = p @ (cubic if iteration == "cubic" else quintic)
        close(train(method, x, 4)[0], c @ p / np.sqrt(size))

    @parameterized.parameters(*BY_MATRIX)
    def test_groups_of_one_feature_are_batch_norm(self, one):
        x = correlated(9, 4)
        y, new = train(one(group_size=1, unbiased_running_var=True, momentum=0.0), x, 1, 1, 1, 1)
        method = nj.BatchNorm(unbiased_running_var=True, momentum=0.0)
        z, expected = oracles.apply(method, Params(), running_for(4), x, train=True)
        close(y, z)
        close(new.mean, expected.mean)
        close(new.cov.ravel(), expected.var)

    @parameterized.parameters("update", "covariance")
    def test_without_steps_from_the_identity_it_is_batch_norm(self, form):
        x, params = correlated(9, 4), params_for(4)
        method = LEARNT(alpha=0.0, form=form)
        state = state_for(method, 4)._replace(**{stored_of(method): np.eye(4)[None]})
        y, new = oracles.apply(method, params, state, x, train=True)
        batch, running = nj.BatchNorm(), running_for(4)
        close(y, oracles.apply(batch, params, running, x, train=True)[0])
        close(new.var, oracles.apply(batch, params, running, x, train=True)[1].var)

    @parameterized.parameters("kl", "frobenius", "covariance")
    def test_learnt_matrices_come_to_whiten(self, rule):
        fields = {"form": rule} if rule == "covariance" else {"criterion": rule}
        method = LEARNT(alpha=0.02, epsilon=0.0, group_size=2, **fields)
        x, state = correlated(50, 4), state_for(method, 2, 2)
        for _ in range(1500):
            y, state = oracles.apply(method, Params(), state, x, train=True)
        for group in (y[:, :2], y[:, 2:]):
            close(covariance(group), np.eye(2), atol=0.05 if rule == "frobenius" else 1e-6)

    def test_half_life_of_the_covariance(self):
        method, x = LEARNT(half_life=3, form="covariance", group_size=2), correlated(9, 4)
        state = start = state_for(method, 2, 2)
        for _ in range(3):
            _, state = oracles.apply(method, Params(), state, x, train=True)
        # (1 - ln 2 / 3)^3 is not quite a half.
        kept, s = (1 - np.log(2) / 3) ** 3, np.corrcoef(x[:, :2].T)
        close(state.cov[0], kept * start.cov[0] + (1 - kept) * s, atol=1e-4)

    def test_alpha_follows_the_count(self):
        x = correlated(9, 4)
        y, new = train(LEARNT(alpha=lambda t: 0.01 * t), x, 4, count=2.0)
        z, expected = train(LEARNT(alpha=0.02), x, 4)
        close(y, z)
        close(new.matrix, expected.matrix)
        self.assertEqual(new.count, 3)

    def test_equal_to_the_identity_the_frobenius_rule_stays(self):
        x = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        method = LEARNT(criterion="frobenius", alpha=0.5, epsilon=0.0)
        state = state_for(method, 2)._replace(matrix=np.eye(2)[None])
        close(oracles.apply(method, Params(), state, x, train=True)[0], x)

    @parameterized.product(one=BY_MATRIX, stored=("covariance", "matrix"))
    def test_evaluation_by_the_batch_is_training(self, one, stored):
        method, x = one(stored=stored, momentum=0.0, group_size=2, shrinkage=0.1), correlated(9, 4)
        y, state = train(method, x, 2, 2)
        close(oracles.apply(method, Params(), state, x, train=False)[0], y)

    def test_last_group_alone(self):
        x = correlated(9, 5)
        y, new = train(nj.DecorrelatedBatchNorm(group_size=3, last_group="smaller"), x, 3, 2)
        close(y[:, 3:], train(nj.DecorrelatedBatchNorm(), x[:, 3:], 2)[0])
        close(new.cov[1, 2], 0)
        close(new.cov[1, :, 2], 0)


class SamplesTest(parameterized.TestCase):
    @parameterized.parameters(None, 3)
    def test_gradients(self, steps):
        """Of two groups of three samples, the second without its last one."""
        method = nj.SampleWhitening(group_size=3, steps=steps)
        x, g, along = (draw(i, 6, 4, 2) for i in (0, 1, 2))
        keep = np.arange(6)[:, None, None] < 5
        dx, _, _ = oracles.gradients(method, (), (), x, g, mask=keep)
        ahead, behind = (
            oracles.apply(method, (), (), x + h * along, train=True, mask=keep)[0]
            for h in (1e-5, -1e-5)
        )
        close((dx * along).sum(), ((ahead - behind) * g).sum() / 2e-5, atol=1e-7)
        assert not dx[5].any()

    def test_samples_are_white_in_their_groups(self):
        method = nj.SampleWhitening(group_size=3, epsilon=0.0)
        y, _ = oracles.apply(method, (), (), draw(0, 6, 4, 2), train=True)
        for group in (y[:3], y[3:]):
            close(covariance(group.reshape(3, -1).T), np.eye(3))
            close(group.mean((1, 2)), 0)


class MasksTest(parameterized.TestCase):
    @parameterized.parameters(*BY_MATRIX, LEARNT)
    def test_masked_rows_are_as_if_dropped(self, one):
        x, keep = correlated(12, 4), np.arange(12) % 4 > 0
        x[~keep] = np.nan
        method = one(group_size=2, unbiased_running_var=True)
        y, new = train(method, x, 2, 2, params=params_for(4), mask=keep[:, None])
        z, expected = train(method, x[keep], 2, 2, params=params_for(4))
        close(y[keep], z)
        for a, b in zip(new[:4], expected[:4], strict=True):
            self.assertEqual(a is None, b is None)
            if a is not None:
                close(a, b)
        self.assertTrue(np.isfinite(y).all())

    @parameterized.product(one=(*BY_MATRIX, LEARNT), average=("exponential", "debiased"))
    def test_empty_batch_changes_nothing(self, one, average):
        count = None if average == "exponential" else 3.0
        method, params = one(running_average=average), params_for(4)
        state = state_for(method, 4, count=count)
        y, new = oracles.apply(method, params, state, correlated(9, 4), train=True, mask=False)
        for before, after in zip(state, new, strict=True):
            np.testing.assert_array_equal(before, after)
        close(y, np.broadcast_to(params.bias, y.shape))

    @parameterized.parameters(*BY_MATRIX, LEARNT)
    def test_skip_nonfinite(self, one):
        method, x = one(skip_nonfinite=True, group_size=2), correlated(9, 4)
        x[2, 1] = np.inf
        state = state_for(method, 2, 2)
        with np.errstate(invalid="ignore"):
            y, kept = oracles.apply(method, Params(), state, x, train=True)
            method = dataclasses.replace(method, skip_nonfinite=False)
            _, spoilt = oracles.apply(method, Params(), state, x, train=True)
        self.assertIs(kept, state)
        self.assertTrue(np.isfinite(y[:, 2:]).all())
        self.assertFalse(np.isfinite(getattr(spoilt, stored_of(method))[0]).all())
