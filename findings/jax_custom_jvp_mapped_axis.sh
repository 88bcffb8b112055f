#!/usr/bin/env bash
# jax 0.10.2 (CPU; 0.12.0.1 does the same): `jax.jit(jax.vmap(f))` of a `custom_jvp` function is differentiated wrongly, without an error, where the
# function and its rule leave the mapped axis at different places. Both compute the same value here, 2 x; the function
# pointwise, which leaves the mapped axis where it was (axis 1), the rule through a reshape, which moves it to the
# front. Under jvp value and tangent come out transposed: batching takes the place of the mapped axis from the function, and
# the rule, which runs later, puts it elsewhere. With unequal sizes the shapes are those of the wrong order. Without the jit
# the result is right. (Related: jax issue 16374, an error with arrays of size zero.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp


@jax.custom_jvp
def double(x):
    return 2.0 * x


@double.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return (2.0 * x.reshape(-1)).reshape(x.shape), 2.0 * t


x = jnp.arange(27.0).reshape(3, 3, 3)
right = jnp.moveaxis(2.0 * x, 1, 0)


def errors(mapped):
    value, tangent = jax.jvp(mapped, (x,), (x,))
    return [float(jnp.abs(a - right).max()) for a in (mapped(x), value, tangent)]


plain, compiled = jax.vmap(double, in_axes=1), jax.jit(jax.vmap(double, in_axes=1))
print("largest errors of the value, and of value and tangent under jvp")
print("vmap", errors(plain))
print("jit of vmap", errors(compiled))
assert errors(plain) == [0.0, 0.0, 0.0]
assert errors(compiled) == [0.0, 24.0, 24.0]

wide = jnp.ones((3, 5, 4))
shapes = [a.shape for a in (compiled(wide), *jax.jvp(compiled, (wide,), (wide,)))]
print("shapes", shapes)
assert shapes == [(5, 3, 4), (3, 5, 4), (3, 5, 4)]
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py"
# Seen:
# largest errors of the value, and of value and tangent under jvp
# vmap [0.0, 0.0, 0.0]
# jit of vmap [0.0, 24.0, 24.0]
# shapes [(5, 3, 4), (3, 5, 4), (3, 5, 4)]
