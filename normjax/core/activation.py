"""The pointwise function that a method takes inside, with its derivatives for the passes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Activation = Callable[[jax.Array], jax.Array] | None


def activate(activation: Activation, z: jax.Array) -> jax.Array:
    """`activation(z)`; None is the identity. ValueError if it changes the shape."""
    if activation is None:
        return z
    y = activation(z)
    if y.shape != z.shape:
        raise ValueError(f"activation={activation!r} makes shape {y.shape} of shape {z.shape}.")
    return y


def activation_tangent(activation: Activation, z: jax.Array, dz: jax.Array) -> jax.Array:
    """The tangent of `activate` at `z` along `dz`."""
    return dz if activation is None else jax.jvp(activation, (z,), (dz,))[1]


def activation_cotangent(
    activation: Activation, z: jax.Array, h: jax.Array, zero: jax.Array
) -> jax.Array:
    """The cotangent of `z` for the cotangent `h` of `activate`.

    `zero` is a zero that broadcasts to `z`, fenced with the other inputs of the pass.
    """
    if activation is None:
        return h
    if activation is jax.nn.relu:
        # Zero or one by operations that XLA on CPU fuses into sums; a select it would write out,
        # and so it would constants that several passes share: hence each pass its own `zero`.
        step = jnp.maximum(z, zero) / jnp.maximum(z, zero + 1e-37)
        return h * lax.stop_gradient(step)
    return jax.vjp(activation, z)[1](h)[0]
