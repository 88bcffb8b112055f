"""Norms of queries and keys in Flax's attention, as `notebooks/README.md` puts them there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx as fnnx

from normjax import linen, nnx

HEADS, HEAD, WIDTH = 2, 4, 8
BOTH = (-2, -1)
FORMS = {  # fields, and the shape of the scale
    "each head": ({}, (HEAD,)),
    "each head, scales of their own": (dict(feature_axes=BOTH), (HEADS, HEAD)),
    "all heads": (dict(reduction_axes=BOTH, feature_axes=BOTH), (HEADS, HEAD)),
}
CAUSAL = nn.make_causal_mask(jnp.ones((3, 5)))
EVERY = pytest.mark.parametrize("name", FORMS)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def expected(name, params, x):
    """Attention of `x` to what was, in float64, with root mean squares of queries and keys one."""
    fields, _ = FORMS[name]
    axes = fields.get("reduction_axes", -1)
    params = jax.tree.map(lambda a: np.asarray(a, "float64"), params)
    project = lambda k: np.einsum("nld,dhk->nlhk", x, params[k]["kernel"]) + params[k]["bias"]

    def normed(k):
        z = project(k)
        return z / np.sqrt((z**2).mean(axes, keepdims=True) + 1e-6) * params[f"{k}_norm"]["scale"]

    logits = np.einsum("nqhd,nkhd->nhqk", normed("query"), normed("key")) / np.sqrt(HEAD)
    logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("nhqk,nkhd->nqhd", weights, project("value"))
    return np.einsum("nlhk,hkd->nld", mixed, params["out"]["kernel"]) + params["out"]["bias"]


def linen_attention(name, **how):
    fields, _ = FORMS[name]

    @functools.wraps(nn.dot_product_attention)
    def attention_fn(query, key, value, **given):
        query = linen.RMSNorm(name="query_norm", **fields)(query)
        key = linen.RMSNorm(name="key_norm", **fields)(key)
        return nn.dot_product_attention(query, key, value, **given)

    return nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, **how)


def params_for(name):
    """Parameters that are not the initial ones."""
    params = linen_attention(name).init(jax.random.key(0), jnp.ones((1, 1, WIDTH)))["params"]
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [a + draw(i, *a.shape) for i, a in enumerate(leaves)])


@EVERY
def test_linen(name):
    params, x = params_for(name), draw(50, 3, 5, WIDTH)
    assert params["query_norm"]["scale"].shape == FORMS[name][1]
    y = linen_attention(name).apply({"params": params}, x, mask=CAUSAL)
    np.testing.assert_allclose(y, expected(name, params, x), rtol=1e-4, atol=1e-4)


@EVERY
def test_nnx(name):
    (fields, shape), params, x = FORMS[name], params_for(name), draw(50, 3, 5, WIDTH)
    how = dict(normalize_qk=True, decode=False, rngs=fnnx.Rngs(0))
    attention = fnnx.MultiHeadAttention(HEADS, WIDTH, **how)
    features = shape if len(shape) > 1 else shape[0]
    attention.query_ln, attention.key_ln = (
        nnx.RMSNorm(features, **fields, rngs=fnnx.Rngs(0)) for _ in range(2)
    )
    places = {"query_norm": "query_ln", "key_norm": "key_ln"}
    for layer, values in params.items():
        for variable, value in values.items():
            getattr(getattr(attention, places.get(layer, layer)), variable).set_value(value)
    y = attention(x, mask=CAUSAL)
    np.testing.assert_allclose(y, expected(name, params, x), rtol=1e-4, atol=1e-4)


def test_decoding_one_by_one():
    name = "each head"
    params, x = params_for(name), draw(50, 3, 5, WIDTH)
    decoder = linen_attention(name, decode=True)
    cache, found = decoder.init(jax.random.key(0), x)["cache"], []
    for i in range(5):
        variables = {"params": params, "cache": cache}
        y, new = decoder.apply(variables, x[:, i : i + 1], mutable=["cache"])
        cache = new["cache"]
        found.append(y)
    y = jnp.concatenate(found, 1)
    np.testing.assert_allclose(y, expected(name, params, x), rtol=1e-4, atol=1e-4)
