"""Conditional, sandwich and adaptive norms, and statistics by branch."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vector_files
from absl.testing import parameterized
from agreement import TOLERANCE, check_rejects, close, draw, ragged
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from methods.conditional_oracle import Recorded, adaptive_instance, conditioned

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax.core.structs import to_dict

KEY = jax.random.key(0)
EXACT = TOLERANCE["float64"]
KINDS = (
    "sandwich_batch_norm conditional_batch_norm aux_batch_norm sandwich_aux_batch_norm adain "
    "sandwich_adain nas_conditional_batch_norm nas_sandwich_batch_norm"
).split()
FILES = [file for kind in KINDS for file in vector_files.names(kind)]
LABELS = np.array([2, 0, 1, 2, 2, 0])


def moved(tree, seed=0, by=0.3):
    """Parameters that are not at their initial values."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + by * jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


def made(method, features, **how):
    params, state = method.init(KEY, features)
    return moved(params, **how), moved(state, 1, 0.0 if not how else 0.1)


class VectorsTest(parameterized.TestCase):
    @parameterized.parameters(*FILES)
    def test_outputs_gradients_state_and_evaluation(self, name):
        with jax.enable_x64(True):
            file = Recorded(name)
            arrays, method = file.arrays, file.method
            params = jax.tree.map(jnp.asarray, file.params())
            _, state = method.init(KEY, arrays["x_1"].shape[-1])
            tracked = [k for k in ("mean", "var") if f"state_0_{k}" in arrays]
            if tracked:
                state = state._replace(**{k: jnp.asarray(arrays[f"state_0_{k}"]) for k in tracked})
            for step in (1, 2, 3):

                def run(params, x, given, state=state):
                    return method.apply(params, state, x, train=True, **given)

                given = jax.tree.map(jnp.asarray, file.inputs(step))
                x = jnp.asarray(arrays[f"x_{step}"])
                y, pull, state = jax.vjp(run, params, x, given, has_aux=True)
                close(y, arrays[f"y_{step}"], EXACT)
                for k in tracked:
                    close(getattr(state, k), arrays[f"state_{step}_{k}"], EXACT)
                if step == 1:
                    dparams, dx, dinput = pull(jnp.asarray(arrays["cotangent"]))
                    close(dx, arrays["grad_x"], EXACT)
                    chex.assert_trees_all_close(dparams, file.params("grad_"), atol=EXACT)
                    if "grad_aux_style" in arrays:
                        close(dinput["style"], arrays["grad_aux_style"], EXACT)
            x, given = jnp.asarray(arrays["x_eval"]), file.inputs("eval")
            y, after = method.apply(params, state, x, train=False, **given)
            close(y, arrays["y_eval"], EXACT)
            chex.assert_trees_all_equal(after, state)

    def test_rows_that_the_first_layer_of_a_cell_does_not_have_had_no_gradient(self):
        names = vector_files.names("nas_sandwich_batch_norm")
        alone = [file for file in map(Recorded, names) if file.shared_alone]
        assert alone
        for file in alone:
            assert not file.arrays["grad_embed"].any()


class OracleTest(parameterized.TestCase):
    @parameterized.product(
        norm=(nj.BatchNorm(), nj.BatchNorm(axis=1, use_scale=False), nj.GroupNorm(2)),
        masked=(False, True),
        train=(True, False),
    )
    def test_classes_and_vectors(self, norm, masked, train):
        axis = getattr(norm, "axis", -1)
        shape = (6, 4, 3, 3) if axis == 1 else (6, 3, 3, 4)
        mask = ragged(1, *shape) if masked else None
        x = draw(0, *shape, dtype="float64")
        spoilt = x if mask is None else np.where(mask, x, np.nan)
        z = draw(3, 6, 5, dtype="float64")
        to_x = lambda a: a.reshape(6, 4, 1, 1) if axis == 1 else a.reshape(6, 1, 1, 4)
        with jax.enable_x64(True):
            for affine, condition in (
                (nj.ClassAffine(3, axis=axis), LABELS),
                (nj.ConditionalAffine(5, axis=axis), z),
                (nj.ConditionalAffine(5, axis=axis, form="tadam"), z),
            ):
                method = nj.Conditioned(norm, affine)
                params, state = made(method, 4, seed=4)
                params = jax.tree.map(np.float64, params)
                how = dict(train=train, mask=mask)
                y, new = method.apply(params, state, spoilt, condition=condition, **how)
                scale, bias = self.rows(params.condition, condition)
                wanted, moved_state = conditioned(
                    norm, params.norm, state, x, to_x(scale), to_x(bias), **how
                )
                keep = True if mask is None else mask
                close(np.where(keep, y, 0), np.where(keep, wanted, 0), EXACT)
                chex.assert_trees_all_close(to_dict(new), to_dict(moved_state), atol=1e-7)

    def rows(self, params, condition):
        if isinstance(params, nj.AffineParams):
            return np.asarray(params.scale)[condition], np.asarray(params.bias)[condition]
        made = np.einsum("bd,drc->brc", condition, np.asarray(params.kernel)) + params.bias
        made = made if params.gain is None else made * params.gain
        return 1 + made[:, 0], made[:, 1]

    @parameterized.parameters(True, False)
    def test_adaptive_instance_norm(self, unbiased):
        x, style = draw(0, 3, 4, 5, 2, dtype="float64"), draw(1, 3, 6, 3, 2, dtype="float64")
        with jax.enable_x64(True):
            method = nj.SandwichAdaptiveInstanceNorm(unbiased_var=unbiased)
            params = jax.tree.map(np.float64, made(method, 2)[0])
            y, _ = method.apply(params, (), x, train=True, style=style)
            wanted = adaptive_instance(x, style, 1e-5, *params, ddof=int(unbiased))
            close(y, wanted, EXACT)


def output(method, params, state, x, **inputs):
    return method.apply(params, state, x, train=True, **inputs)[0]


class LimitsTest(parameterized.TestCase):
    def test_equal_rows_are_batch_norm_with_the_composed_affine(self):
        x, method = draw(0, 6, 3, 3, 4), nj.SandwichBatchNorm(3)
        params, state = made(method, 4)
        first = jax.tree.map(lambda a: jnp.broadcast_to(a[0], a.shape), params.condition)
        params, row = params._replace(condition=first), jax.tree.map(lambda a: a[0], first)
        scale, bias = params.norm
        composed = nj.AffineParams(scale * row.scale, bias * row.scale + row.bias)
        wanted = nj.BatchNorm().apply(composed, state, x, train=True)
        got = method.apply(params, state, x, train=True, condition=LABELS)
        chex.assert_trees_all_close(got, wanted, atol=1e-5)

    def test_a_shared_affine_of_one_is_conditional_batch_norm(self):
        x, g = draw(0, 6, 3, 3, 4), draw(1, 6, 3, 3, 4)
        params, state = made(nj.SandwichBatchNorm(3), 4)
        pulled = []
        for method, norm in (
            (nj.SandwichBatchNorm(3), nj.BatchNorm().init(None, 4)[0]),
            (nj.ConditionalBatchNorm(num_classes=3), nj.AffineParams()),
        ):

            def run(rows, x, method=method, norm=norm):
                given = nj.ConditionedParams(norm, rows)
                return output(method, given, state, x, condition=LABELS)

            y, pull = jax.vjp(run, params.condition, jnp.asarray(x))
            pulled.append((y, pull(g)))
        chex.assert_trees_all_close(*pulled, atol=1e-5)

    def test_the_output_of_a_sample_of_group_norm_depends_on_it_alone(self):
        x = draw(0, 6, 3, 3, 4)
        others = np.concatenate([x[:1], 5 * draw(1, 5, 3, 3, 4)])
        group = nj.ConditionalGroupNorm(2, num_classes=3)
        for method, same in ((group, True), (nj.ConditionalBatchNorm(num_classes=3), False)):
            variables = made(method, 4)
            first, second = (output(method, *variables, a, condition=LABELS) for a in (x, others))
            assert np.array_equal(first[0], second[0]) == same

    @parameterized.parameters("film", "adaln_zero", "tadam")
    def test_it_starts_as_the_plain_norm(self, form):
        x, z = draw(0, 6, 5, 4), draw(1, 6, 8)
        for method, norm in (
            (nj.AdaptiveLayerNorm(condition_features=8, form=form), nj.LayerNorm()),
            (nj.ConditionalBatchNorm(condition_features=8, form=form), nj.BatchNorm()),
            (nj.Conditioned(nj.RMSNorm(), nj.ConditionalAffine(8, form=form)), nj.RMSNorm()),
        ):
            y = output(method, *method.init(KEY, 4), x, condition=z)
            close(y, output(norm, *norm.init(KEY, 4), x), 1e-6)

    def test_the_gate_starts_at_zero_and_is_for_what_comes_behind(self):
        x, z = draw(0, 6, 5, 4).astype("bfloat16"), draw(1, 6, 8)
        method = nj.AdaptiveLayerNorm(condition_features=8, form="adaln_zero")
        params, _ = method.init(KEY, 4)
        gate = method.gate(params, x, z)
        chex.assert_trees_all_equal(gate, jnp.zeros((6, 1, 4), "bfloat16"))
        bias = params.condition.bias.at[2].set(0.5)
        opened = params._replace(condition=params.condition._replace(bias=bias))
        chex.assert_trees_all_equal(method.gate(opened, x, z), gate + 0.5)
        slope = jax.grad(lambda p: jnp.sum(method.gate(p, x, z).astype(float)))(params)
        assert np.any(slope.condition.kernel[:, 2]) and not np.any(slope.condition.kernel[:, :2])
        plain = nj.ConditionalAffine(8)
        with pytest.raises(ValueError, match="no gate"):
            plain.gate(plain.init(KEY, 4)[0], x, z)

    def test_weights_of_one_class_are_the_class_and_mixtures_are_mixed(self):
        x, method = draw(0, 6, 3, 4), nj.ClassAffine(3)
        params, state = method.init(KEY, 4)
        run = lambda c: output(method, params, state, x, condition=c)
        close(run(np.eye(3, dtype="float32")[LABELS]), run(LABELS), 1e-6)
        half = np.tile(np.array([0.5, 0.5, 0], "float32"), (6, 1))
        close(run(half), (run(np.zeros(6, int)) + run(np.ones(6, int))) / 2, 1e-6)

    def test_a_condition_for_samples_positions_or_the_whole_batch(self):
        x = draw(0, 6, 5, 4)
        classes = nj.Conditioned(nj.LayerNorm(), nj.ClassAffine(3))
        vectors = nj.AdaptiveLayerNorm(condition_features=8)
        for method, one in ((classes, np.array(1)), (vectors, draw(1, 8))):
            variables = made(method, 4)
            wanted = output(method, *variables, x, condition=one)
            for lead in ((6,), (6, 5), (1, 5), (6, 1)):
                c = np.broadcast_to(one, (*lead, *one.shape))
                close(output(method, *variables, x, condition=c), wanted, 1e-6)
        tokens, variables = np.arange(30).reshape(6, 5) % 3, made(classes, 4)
        y = output(classes, *variables, x, condition=tokens)
        for c in range(3):
            z = output(classes, *variables, x, condition=c)
            close(y[tokens == c], z[tokens == c], 1e-6)

    def test_evaluation_folds_for_a_given_condition(self):
        x = draw(0, 6, 3, 3, 4)
        for method, how in (
            (nj.SandwichBatchNorm(3), {"condition": 2}),
            (nj.ConditionalBatchNorm(condition_features=5), {"condition": draw(1, 5)}),
            (nj.SandwichAuxBatchNorm(3), {"branch": 1}),
        ):
            params, state = made(method, 4)
            n = method.evaluation(params, state, **how)
            y, _ = method.apply(params, state, x, train=False, **how)
            assert n.scale.shape == n.bias.shape == (4,)
            mean, inverse, scale, bias = map(np.asarray, n)
            close((x - mean) * inverse * scale + bias, y, 1e-5)

    @parameterized.parameters(
        nj.BatchNorm(activation=jax.nn.relu),
        nj.BatchNorm(axis=1, activation=jax.nn.relu),
        nj.SpectralBatchNorm(activation=jax.nn.relu),
        nj.chain(nj.BatchNorm(), nj.Affine()),
        nj.LayerNorm(cast="before_scale", activation=jax.nn.relu),
    )
    def test_in_one_pass_or_two_the_activation_comes_last(self, norm):
        x = draw(0, 6, 4, 4, 4)
        affine = nj.ClassAffine(3, axis=getattr(norm, "axis", -1))
        method = nj.Conditioned(norm, affine)
        params, state = made(method, 4)
        y, new = method.apply(params, state, x, train=True, condition=LABELS)
        has = hasattr(norm, "activation")
        bare = dataclasses.replace(norm, activation=None) if has else norm
        z, wanted = bare.apply(params.norm, state, x, train=True)
        z = output(affine, params.condition, (), z, condition=LABELS)
        close(y, jax.nn.relu(z) if has else z, 1e-5)
        chex.assert_trees_all_close(new, wanted, atol=1e-6)

    @parameterized.parameters(nj.ConditionalBatchNorm(num_classes=3), nj.SandwichBatchNorm(3))
    def test_weights_are_repeated_samples(self, method):
        x, times = draw(0, 6, 3, 4), np.array([2, 0, 1, 1, 3, 1])
        variables = made(method, 4)
        spoilt = np.where(times.reshape(-1, 1, 1) > 0, x, np.nan)
        weights = times.reshape(-1, 1, 1).astype("float32")
        y, moved_state = method.apply(
            *variables, spoilt, train=True, condition=LABELS, weights=weights
        )
        z, wanted = method.apply(
            *variables, np.repeat(x, times, 0), train=True, condition=np.repeat(LABELS, times)
        )
        close(np.repeat(y, times, 0), z, 1e-5)
        chex.assert_trees_all_close(moved_state, wanted, atol=1e-6)

    def test_segments_of_the_norm(self):
        x, ids = draw(0, 6, 5, 4), np.arange(30).reshape(6, 5, 1) % 3 - 1
        norm = nj.LayerNorm(reduction_axes=(1, 2), num_segments=2)
        method = nj.Conditioned(norm, nj.ClassAffine(3))
        params, state = made(method, 4)
        y = output(method, params, state, x, condition=LABELS, segment_ids=ids)
        z = output(norm, params.norm, state, x, segment_ids=ids)
        z = output(method.affine, params.condition, (), z, condition=LABELS)
        close(y, z, 1e-5)

    def test_parameters_in_half_precision_are_joined_in_float32(self):
        x = draw(0, 6, 3, 4)
        for method, condition in (
            (nj.SandwichBatchNorm(3, param_dtype="bfloat16"), LABELS),
            (nj.Conditioned(nj.BatchNorm(), nj.ConditionalAffine(5)), draw(1, 6, 5)),
        ):
            params, state = made(method, 4)
            params = jax.tree.map(lambda a: a.astype("bfloat16"), params)
            wide = jax.tree.map(lambda a: a.astype("float32"), params)
            run = lambda p, m=method, s=state, c=condition: output(m, p, s, x, condition=c)
            chex.assert_trees_all_equal(run(params), run(wide))

    def test_a_gate_and_a_condition(self):
        x, gate = draw(0, 6, 5, 4), draw(1, 6, 5, 4)
        method = nj.Conditioned(nj.RMSNorm(), nj.ClassAffine(3, use_bias=False))
        variables = made(method, 4)
        y = output(method, *variables, x, gate=gate, condition=LABELS)
        z = output(method, *variables, x, condition=LABELS)
        close(y, z * jax.nn.silu(gate), 1e-5)


class BranchesTest(parameterized.TestCase):
    @parameterized.parameters(
        nj.MultiStats(nj.BatchNorm(running_average="cumulative"), 3),
        nj.AuxBatchNorm(3),
        nj.SandwichAuxBatchNorm(3),
        nj.MultiStats(nj.SpectralBatchNorm(), 3),
    )
    def test_an_update_touches_its_branch_only(self, method):
        x = draw(0, 6, 4, 4, 4)
        params, state = made(method, 4)
        run = jax.jit(lambda s, b: method.apply(params, s, x, train=True, branch=b))
        for branch in (2, np.array(0)):
            y, new = run(state, branch)
            same = method.apply(params, state, x, train=True, branch=int(branch))
            chex.assert_trees_all_close((y, new), same, atol=1e-6)
            pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True))
            changed = {i for a, b in pairs for i in range(3) if not np.array_equal(a[i], b[i])}
            assert changed == {int(branch)}
            absorbed = method.absorb(state, method.observe(x), branch=branch)
            chex.assert_trees_all_close(absorbed, new, atol=1e-6)

    def test_branches_with_the_same_data_keep_the_same_statistics(self):
        method = nj.SandwichAuxBatchNorm()
        params, state = method.init(KEY, 4)
        for seed in range(3):
            for branch in (0, 1):
                x = 2 + draw(seed, 6, 3, 4)
                _, state = method.apply(params, state, x, train=True, branch=branch)
        chex.assert_trees_all_equal(*(jax.tree.map(lambda a, i=i: a[i], state) for i in (0, 1)))
        assert np.all(state.mean > 0.01)

    def test_a_branch_of_its_own_for_each_member_of_an_ensemble(self):
        method, x = nj.AuxBatchNorm(), draw(0, 6, 4)
        params, state = made(method, 4)
        run = lambda b: method.apply(params, state, x, train=True, branch=b)
        together = jax.vmap(run)(jnp.arange(2))
        for b in (0, 1):
            alone = jax.tree.map(lambda a, b=b: a[b], together)
            chex.assert_trees_all_close(alone, run(b), atol=1e-6)

    def test_operations_are_digits(self):
        run = jax.jit(lambda a: nj.operation_index(a, 3))
        every = {int(run(np.array([i, j]))) for i in range(3) for j in range(3)}
        assert every == set(range(9))
        with pytest.raises(ValueError, match="operation 3"):
            nj.operation_index([0, 3], 3)


X = draw(0, 6, 3, 4)
CLASSES, VECTORS = nj.ClassAffine(3), nj.ConditionalAffine(5)
DOMAINS = nj.MultiStats(nj.BatchNorm(), 2)
BAD_CALLS = (
    (CLASSES, {"condition": np.array([0, 1, 2, 3, 0, 0])}, "class 3", "0 to 2"),
    (nj.SandwichBatchNorm(3), {"condition": np.array([0, 1, 2, -1, 0, 0])}, "class -1"),
    (nj.ConditionalGroupNorm(2, num_classes=3), {"condition": 7}, "class 7"),
    (CLASSES, {"condition": np.zeros(5, int)}, "(5,)", "[6, 3]"),
    (CLASSES, {"condition": np.zeros((6, 4), int)}, "(6, 4)"),
    (CLASSES, {"condition": np.zeros((6, 4))}, "(6, 4)", "3 on the last axis"),
    (CLASSES, {"condition": np.zeros(6, bool)}, "bool"),
    (CLASSES, {}, "condition=None"),
    (VECTORS, {"condition": np.zeros((5, 5))}, "(5, 5)", "a vector"),
    (VECTORS, {"condition": np.zeros((6, 4))}, "(6, 4)", "condition_features=5"),
    (VECTORS, {"condition": np.zeros((6, 5), complex)}, "complex"),
    (VECTORS, {}, "condition=None"),
    (nj.AdaptiveLayerNorm(), {"condition": np.zeros((6, 8))}, "tuple"),
    (nj.AdaptiveLayerNorm(), {"condition": (np.zeros((6, 4)),)}, "scale, bias"),
    (nj.AuxBatchNorm(2), {"branch": 2}, "branch=2"),
    (nj.AuxBatchNorm(2), {"branch": -1}, "branch=-1"),
    (DOMAINS, {}, "branch=None"),
    (DOMAINS, {"branch": 0.5}, "float"),
    (DOMAINS, {"branch": np.zeros(6, int)}, "(6,)"),
    (nj.AdaptiveInstanceNorm(), {"style": np.zeros((6, 7, 3))}, "(6, 7, 3)", "(6, 3, 4)"),
    (nj.AdaptiveInstanceNorm(), {"style": np.zeros((5, 7, 4))}, "(5, 7, 4)"),
    (nj.AdaptiveInstanceNorm(), {}, "style=None"),
)
ONES = jax.nn.initializers.ones
BAD_FIELDS = (
    (nj.Conditioned, (nj.BatchNorm(axis=1), CLASSES), {}, "axis=(-1,)", "(1,)"),
    (nj.Conditioned, (nj.BatchNorm(), nj.Affine()), {}, "ClassAffine"),
    (nj.Conditioned, (nj.Ghost(nj.BatchNorm(), 2), CLASSES), {}, "wrapper"),
    (nj.Conditioned, (nj.SandwichBatchNorm(3), CLASSES), {}, "wrapper"),
    (nj.ClassAffine, (0,), {}, "num_classes=0"),
    (nj.ConditionalAffine, (5,), {"form": "adaln"}, "form='adaln'"),
    (nj.ConditionalAffine, (None,), {"form": "tadam"}, "condition_features=None"),
    (nj.ConditionalBatchNorm, (), {"num_classes": 3, "condition_features": 5}, "give one"),
    (nj.ConditionalBatchNorm, (), {"num_classes": 3, "form": "tadam"}, "vectors"),
    (nj.AdaptiveLayerNorm, (), {"condition_features": 5, "bias_init": ONES}, "scale_init"),
    (nj.MultiStats, (nj.BatchNorm(), 0), {}, "num_branches=0"),
)


class BadInputTest(parameterized.TestCase):
    @parameterized.parameters(*BAD_CALLS)
    def test_inputs(self, method, given, *pieces):
        variables = method.init(KEY, 4)
        for train in (True, False):
            check_rejects(self, pieces, method.apply, *variables, X, train=train, **given)

    @parameterized.parameters(*BAD_FIELDS)
    def test_fields(self, kind, args, given, *pieces):
        check_rejects(self, pieces, kind, *args, **given)

    def test_the_scales_of_classes_need_a_key(self):
        check_rejects(self, ("key=None",), nj.ClassAffine(3).init, None, 4)

    @parameterized.parameters(
        (nj.SandwichBatchNorm(3), "condition", np.full(6, 2)),
        (nj.AuxBatchNorm(3), "branch", np.array(2)),
    )
    def test_traced_classes_and_branches_out_of_range_are_clipped(self, method, name, last):
        params, state = made(method, 4)
        run = jax.jit(lambda c: method.apply(params, state, X, train=True, **{name: c}))
        chex.assert_trees_all_equal(run(last + 5), run(last))
        chex.assert_trees_all_equal(run(last - 9), run(0 * last))


class Block(nn.Module):
    """A residual block by adaLN-Zero."""

    @nn.compact
    def __call__(self, x, z):
        norm = normjax.linen.AdaptiveLayerNorm(condition_features=8, form="adaln_zero")
        y = nn.Dense(4)(norm(x, condition=z))
        return x + norm.method_of().gate(norm.unpack(x)[0], x, z) * y


class FrontsTest(parameterized.TestCase):
    def test_a_linen_block_starts_as_the_identity(self):
        x, z = draw(0, 6, 5, 4), draw(1, 6, 8)
        variables = Block().init(KEY, x, z)
        chex.assert_trees_all_equal(Block().apply(variables, x, z), jnp.asarray(x))

    def test_linen_moves_a_branch_and_sows(self):
        x = draw(0, 6, 5, 4)
        aux = normjax.linen.AuxBatchNorm()
        variables = aux.init(KEY, x, use_running_average=True, branch=0)
        how = dict(use_running_average=False, mutable=["batch_stats"])
        _, new = aux.apply(variables, x, branch=1, **how)
        stats = new["batch_stats"]["mean"]
        assert not stats[0].any() and stats[1].any()
        norm = normjax.linen.Norm(nj.Conditioned(nj.BatchNorm(), nj.ClassAffine(3)))
        how = dict(condition=LABELS, use_running_average=False)
        variables = norm.init(KEY, x, **how)
        _, new = norm.apply(variables, x, **how, mutable=["batch_stats", "moments"])
        chex.assert_shape(new["moments"]["seen"][0].mean, (4,))

    def test_nnx(self):
        x, z = draw(0, 6, 5, 4), draw(1, 6, 8)
        fields = dict(condition_features=8, form="adaln_zero")
        norm = normjax.nnx.AdaptiveLayerNorm(4, **fields, rngs=nnx.Rngs(0))
        close(norm(x, condition=z), normjax.nnx.LayerNorm(4, rngs=nnx.Rngs(0))(x), 1e-6)
        assert not norm.method.gate(norm.unpack()[0], x, z).any()

    def test_nnx_modules_with_fresh_initializers_are_equal(self):
        first, second = (
            normjax.nnx.SandwichBatchNorm(
                4, 3, class_scale_init=nnx.initializers.constant(0.5), rngs=nnx.Rngs(0)
            )
            for _ in range(2)
        )
        assert nnx.graphdef(first) == nnx.graphdef(second)
        assert first.condition["scale"][...].mean() == 0.5

    def test_a_fresh_initializer_needs_no_new_trace(self):
        traces = []

        def count(z):
            traces.append(z.shape)
            return z

        def call():
            rows = nj.ClassAffine(3, scale_init=lambda *shape: jnp.ones(*shape[1:]))
            method = nj.Conditioned(nj.BatchNorm(activation=count), rows)
            output(method, *method.init(KEY, 4), X, condition=LABELS)
            return len(traces)

        assert call() == call() > 0


class ShardingTest(parameterized.TestCase):
    def test_rows_of_a_table_with_sharded_features_over_an_explicit_mesh(self):
        mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Explicit,) * 2)
        x, labels, method = draw(0, 8, 3, 4), np.arange(8) % 3, nj.SandwichBatchNorm(3)
        variables = made(method, 4)
        step = lambda p, s, x, c: method.apply(p, s, x, train=True, condition=c)
        loss = lambda *args: jnp.sum(jnp.sin(step(*args)[0]))
        both = lambda *args: (step(*args), jax.grad(loss)(*args))
        wanted = both(*variables, x, labels)
        with jax.set_mesh(mesh):
            put = lambda a, *parts: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*parts)))
            last = lambda a: put(a, *(None,) * (a.ndim - 1), "model")
            args = *jax.tree.map(last, variables), put(x, "batch", None, "model")
            got = jax.jit(both)(*args, put(labels, "batch"))
        chex.assert_trees_all_close(got, wanted, atol=1e-5)
