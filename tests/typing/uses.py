"""Uses that a type checker must accept."""

from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

import normjax as nj
from normjax import linen, nnx
from normjax.linen.carry import carry

x: jax.Array = jnp.ones((8, 4, 4, 16))
key = jax.random.key(0)

batch = nj.BatchNorm(momentum=0.9, activation=jax.nn.relu, running_average="pooled")
params, state = batch.init(key, 16)
assert_type(params, nj.AffineParams)
assert_type(state, nj.Running)
y, moved = batch.apply(params, state, x, train=True, mask=x > 0)
assert_type(y, jax.Array)
pooled = nj.pool(batch.observe(x), batch.observe(x[:2]))
recalibrated: nj.Running = batch.absorb(state, pooled)
folded: nj.Normalizer = batch.evaluation(params, state)
scheduled = nj.BatchNorm(momentum=lambda count: 1 - 1 / (count + 2))

ghost = nj.Ghost(nj.KalmanNorm(gain="learned"), groups=4, running="first")
prior = nj.propagate.prediction(jnp.zeros(16), jnp.ones(16))
z, _ = ghost.apply(*ghost.init(key, 16), x, train=True, prior=prior)
posterior: nj.Moments = nj.KalmanNorm().posterior(nj.KalmanParams(scale=jnp.ones(16)))

row = nj.chain(nj.LayerNorm(use_scale=False), nj.Affine(), nj.Derf(alpha_init=0.3))
method: nj.Method = row
methods: list[nj.Method] = [batch, ghost, nj.GroupNorm(4), nj.SpectralBatchNorm(bands=4)]
normalization: nj.Normalization = batch
traits: nj.Traits = nj.GhostNoise(16).traits

module = linen.BatchNorm(use_running_average=False, momentum=0.9)
variables = module.init(key, x)
with carry([(x, prior)]) as tracker:
    w = linen.KalmanNorm().apply(variables, x, False)
found: nj.Moments | None = tracker.get(x)

norm = nnx.GroupNorm(16, num_groups=4, rngs=flax_nnx.Rngs(0))
assert_type(norm(x), jax.Array)
epsilon: float = norm.epsilon
