"""Activations with a threshold and the weight normalized addition."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import vector_files
from agreement import TOLERANCE, close, draw, run

import normjax as nj


@pytest.mark.parametrize("name", vector_files.names("tprelu"))
def test_recorded_outputs(name):
    agreement.check_vectors(name)


@pytest.mark.parametrize("name", vector_files.names("wn_addition"))
def test_recorded_additions(name):
    config, arrays = vector_files.load(name)
    initial, number = tuple(config["initial_weight"]), config["num_operands"]
    method = nj.WeightNormalizedAddition(initial=initial, epsilon=1e-8, epsilon_place="norm")
    operands = lambda k: tuple(arrays[f"aux_{k}_operand_{i}"] for i in range(1, number))

    def output(weight, x, others):
        return method.apply(nj.AdditionParams(weight), (), x, train=True, others=others)[0]

    with jax.enable_x64(True):
        weight = jnp.asarray(arrays["param_weight"])
        for k in (1, 2, 3):
            close(output(weight, arrays[f"x_{k}"], operands(k)), arrays[f"y_{k}"], 1e-10)
        _, pull = jax.vjp(output, weight, jnp.asarray(arrays["x_1"]), operands(1))
        dweight, dx, dothers = pull(jnp.asarray(arrays["cotangent"]))
        close((dweight, dx), (arrays["grad_weight"], arrays["grad_x"]), 1e-10)
        for i, got in enumerate(dothers, 1):
            close(got, arrays[f"grad_aux_operand_{i}"], 1e-10)


@pytest.mark.parametrize("method", (nj.TReLU(axis=1), nj.TPReLU(axis=(1, -1))))
@pytest.mark.parametrize("kind", agreement.KINDS)
def test_oracle(method, kind):
    dtype, masked = kind
    mask = agreement.ragged(1, 5, 3, 4) if masked else None
    features = 3 if method.axis == 1 else (3, 4)
    agreement.check_oracle(method, features, draw(0, 5, 3, 4), mask=mask, dtype=dtype)


@pytest.mark.parametrize("place", ("square", "norm"))
def test_oracle_of_the_addition(place):
    method = nj.WeightNormalizedAddition(
        initial=(0.5, -1.0), epsilon=0.1, epsilon_place=place, axis=1
    )
    x, other, mask = draw(0, 5, 3, 4), draw(1, 5, 3, 4), agreement.ragged(2, 5, 3, 4)
    params, state = method.init(None, 3)
    y, _ = method.apply(params, state, x, train=True, mask=mask, others=other)
    wanted, _ = oracles.apply(method, params, state, x, train=True, mask=mask, others=other)
    close(y, wanted.astype("float32"), TOLERANCE["float32"])


def test_slopes_at_and_beyond_the_ends():
    """At one the identity, at zero `TReLU`; beyond the ends the same without a gradient."""
    x, slopes = draw(0, 6, 4), jnp.array([-1.0, 0.0, 1.0, 2.0])
    params = nj.ThresholdParams(jnp.full(4, 0.25), slopes)
    y, _, (dparams, _) = run(nj.TPReLU(), params, (), x, cotangent=np.ones_like(x))
    close(y, np.stack([*np.maximum(x[:, :2], 0.25).T, *x[:, 2:].T], 1), 1e-6)
    sums = np.minimum(x - 0.25, 0).sum(0)
    close(dparams.slope, np.where([False, True, True, False], sums, 0), 1e-5)


def test_initial_values():
    params, state = nj.TPReLU(param_dtype=jnp.bfloat16).init(jax.random.key(0), (2, 3))
    assert params.slope.dtype == jnp.bfloat16 and params.slope.shape == (2, 3) and state == ()
    x = draw(0, 5, 4)
    method = nj.WeightNormalizedAddition()
    y, _ = method.apply(*method.init(None, 4), draw(1, 5, 4), train=True, others=x)
    np.testing.assert_array_equal(y, x)  # the shortcut alone


def test_independent_inputs_keep_their_variance():
    method = nj.WeightNormalizedAddition(initial=(3.0, -4.0, 0.5))
    x, *others = draw(0, 3, 20_000, 2)
    y, _ = method.apply(*method.init(None, 2), x, train=True, others=tuple(others))
    np.testing.assert_allclose(np.var(y, 0), 1, atol=0.05)


@pytest.mark.parametrize(
    ("fields", "others", "text"),
    [
        ({"initial": (1.0,)}, None, "initial=.* is not two finite numbers"),
        ({"initial": (0.0, 0.0)}, None, "initial"),
        ({}, None, r"others of shapes \[None\].*give 1 of the input's shape"),
        ({}, np.ones((2, 1)), r"others of shapes \[\(2, 1\)\]"),
        ({}, (np.ones((2, 3)),) * 2, "give 1 of"),
    ],
)
def test_bad_additions(fields, others, text):
    with pytest.raises(ValueError, match=text):
        method = nj.WeightNormalizedAddition(**fields)
        method.apply(*method.init(None, 3), np.ones((2, 3)), train=True, others=others)


def test_features_that_do_not_fit():
    with pytest.raises(ValueError, match="TReLU: the input of shape"):
        nj.TReLU().apply(*nj.TReLU().init(None, 3), np.ones((2, 4)), train=True)
