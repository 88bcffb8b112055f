"""Uses that a type checker must refuse: one error in every line that says so."""

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

import normjax as nj
from normjax import linen, nnx
from normjax.linen.carry import carry

x: jax.Array = jnp.ones((8, 4, 4, 16))
params, state = nj.BatchNorm().init(None, 16)

nj.BatchNorm().apply(params, state, x)  # error: nobody says whether to train
nj.BatchNorm().apply(params, state, train=True)  # error: no input
nj.BatchNorm(0.9)  # error: fields go by name
nj.BatchNorm(momentum="slow")  # error
nj.BatchNorm(running_average="harmonic")  # error
nj.BatchNorm(decay=0.9)  # error: there is no such field
nj.BatchNorm().axis = 1  # error: a configuration is frozen
nj.Ghost(nj.BatchNorm())  # error: how many groups?
nj.Ghost(nj.BatchNorm(), groups=2, running="last")  # error
nj.EvalNorm()  # error: evaluation needs the size
nj.AnalyticGhostNoise()  # error
nj.KalmanNorm(gain="optimal")  # error
nj.KalmanNorm().posterior()  # error: it is a function of the parameters
nj.SpectralBatchNorm(spectrum="quarter")  # error
nj.Normalizer(jnp.zeros(3), jnp.ones(3), gain=jnp.ones(3))  # error
nj.Traits(inputs={"prior": "half"})  # error
method: nj.Method = jax.nn.relu  # error: a function is no method
mean, var = nj.BatchNorm().observe(x).mean.shape, nj.Moments(x).var  # error: what is the mean?
linen.BatchNorm(momentums=0.9)  # error
nnx.LayerNorm(16)  # error: without rngs
nnx.GroupNorm(16, num_groups="all", rngs=flax_nnx.Rngs(0))  # error
with carry(posterior="batch"):  # error
    pass
