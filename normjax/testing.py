"""The contract of a normalization: `check_method` puts a method through every promise.

The project's own tests call it for every method; call it for one of your own.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from normjax.core import checks, passes, spectra
from normjax.core.structs import to_dict

__all__ = [
    "Subject",
    "check_method",
    "count_collectives",
    "plain_derivatives",
    "residual_bytes",
    "with_axis_name",
]

AXIS = "batch"
PASSES = {
    passes: ("_mean_var", "_affine", "_rows"),
    spectra: ("_spatial_moments", "_spatial_affine"),
}
EXACT = dict(rtol=1e-10, atol=1e-10)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A method under test with data that fit it.

    Attributes:
      method: the method.
      shape: shape of the input, the batch first.
      residual_bytes: how many bytes per byte of input reverse mode may keep; None: any number.
      drops_rows: whether a mask of samples gives exactly what dropping them gives.
      roundings: how often half precision rounds on the way to the output.
      collectives: how many collectives the forward pass may need; the backward pass as many more.
      masks_positions: whether a mask may hide single positions of a sample.
      fits_positions: whether the method fits any number of positions, not those of `shape` only.
      extra: further inputs of `apply` by name, made for the dtype of the statistics and the sizes
        of the feature axes; None: none.

    Example:
      >>> import normjax as nj
      >>> Subject(nj.BatchNorm(), (16, 3)).features
      3
    """

    method: Any
    shape: tuple[int, ...]
    residual_bytes: float | None = 1.1
    drops_rows: bool = True
    roundings: int = 1
    collectives: int = 1
    masks_positions: bool = True
    fits_positions: bool = True
    extra: Callable[[Any, Any], dict[str, Any]] | None = None

    @property
    def features(self) -> int | tuple[int, ...]:
        """Sizes of the feature axes."""
        at = checks.feature_axes(self.method)
        return tuple(self.shape[i] for i in at) if isinstance(at, tuple) else self.shape[at]

    def variables(self, dtype: Any = None) -> tuple[Any, Any]:
        """Parameters and state that are not at their initial values; in `dtype` if given."""
        params, state = self.method.init(jax.random.key(0), self.features)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves) + 1)
        leaves = [
            a + 0.3 * jax.random.normal(k, a.shape, a.dtype)
            for a, k in zip(leaves, keys, strict=False)
        ]
        params = jax.tree.unflatten(tree, leaves)
        state = jax.tree.map(lambda a: a + 0.25, state)
        if dtype is not None:
            params, state = jax.tree.map(lambda a: a.astype(dtype), (params, state))
        return params, state

    def inputs(self, dtype: Any = jnp.float32, seed: int = 2) -> jax.Array:
        """A normal sample with mean 0.5."""
        return 0.5 + jax.random.normal(jax.random.key(seed), self.shape, dtype)

    def rows(self) -> jax.Array:
        """A mask of samples, ragged over eight consecutive parts of the batch, one empty."""
        keep = np.random.default_rng(3).random(self.shape[0]) < 0.7
        part = max(self.shape[0] // 8, 1)
        keep[:part] = True
        keep[2 * part : 3 * part] = False
        return jnp.asarray(keep).reshape(-1, *(1,) * (len(self.shape) - 1))

    def apply(self, params, state, x, mask=None, *, train=True, method=None):
        """`method.apply` with a key if the method is random, and without the moments of a pair."""
        key = jax.random.key(7) if train and checks.is_random(self.method) else None
        method = self.method if method is None else method
        extra = {} if self.extra is None else self.extra(passes.wide(x.dtype), self.features)
        y, state = method.apply(params, state, x, train=train, mask=mask, key=key, **extra)
        return (y[0] if checks.returns_posterior(method) else y), state


def check_method(
    method: Any,
    shape: tuple[int, ...],
    *,
    residual_bytes: float | None = 1.1,
    drops_rows: bool = True,
    roundings: int = 1,
    collectives: int = 1,
    masks_positions: bool = True,
    fits_positions: bool = True,
    extra: Callable[[Any, Any], dict[str, Any]] | None = None,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
) -> list[str]:
    """Puts a method through the contract.

    Checks that need devices use all there are, two or more; where there is one, simulate several
    with `XLA_FLAGS=--xla_force_host_platform_device_count=8`.

    Args:
      method: an object with `init` and `apply`. Under mapped axes a method that differs between
        training and evaluation gets `axis_name` set, in itself or in the methods that it is made
        of.
      shape: shape of an input, the batch first; the number of devices must divide the batch.
      residual_bytes: how many bytes per byte of input reverse mode may keep; None: any number.
      drops_rows: whether a mask of samples must give exactly what dropping them gives.
      roundings: how often half precision may round on the way to the output (a chain: once per
        method).
      collectives: how many collectives the forward pass may need (a chain: one per method), and
        the backward pass as many more.
      masks_positions: whether a mask may hide single positions of a sample.
      fits_positions: whether the method fits any number of positions, not those of `shape` only.
      extra: further inputs of `apply` by name, made for the dtype of the statistics and the sizes
        of the feature axes; None: none.
      only: names of the checks to run, of `CHECKS`; None: all.
      skip: names of checks not to run.

    Returns:
      The names of the checks that ran.

    Raises:
      AssertionError: at the first promise that does not hold.
      ValueError: for an unknown check.

    Example:
      >>> import normjax as nj
      >>> check_method(nj.BatchNorm(), (16, 4), only=("structure", "masks"))
      ['structure', 'masks']
    """
    chosen = list(CHECKS) if only is None else list(only)
    for name in (*chosen, *skip):
        if name not in CHECKS:
            raise ValueError(f"check_method: {name!r} is not one of {', '.join(CHECKS)}.")
    chosen = [name for name in chosen if name not in set(skip)]
    subject = Subject(
        method,
        shape,
        residual_bytes,
        drops_rows,
        roundings,
        collectives,
        masks_positions,
        fits_positions,
        extra,
    )
    for name in chosen:
        CHECKS[name](subject)
    return chosen


@contextlib.contextmanager
def plain_derivatives():
    """While it is open, functions traced anew are differentiated by plain autodiff of the formulas.

    Example:
      >>> import jax, normjax as nj
      >>> params, state = nj.LayerNorm().init(None, 3)
      >>> loss = lambda x: (nj.LayerNorm().apply(params, state, x)[0] ** 3).sum()
      >>> with plain_derivatives():
      ...     print(jax.grad(loss)(jax.numpy.ones((2, 3))).shape)
      (2, 3)
    """
    with contextlib.ExitStack() as stack:
        for module, names in PASSES.items():
            for name in names:
                plain = getattr(module, name).__wrapped__
                stack.enter_context(mock.patch.object(module, name, plain))
        stack.callback(jax.clear_caches)
        jax.clear_caches()
        yield


def residual_bytes(function: Callable, *args: jax.Array) -> float:
    """Bytes that reverse mode keeps across a jit boundary, per byte of the last argument.

    Example:
      >>> import jax.numpy as jnp
      >>> residual_bytes(jnp.sin, jnp.ones(8))
      1.0
    """
    _, pullback = jax.jit(lambda *a: jax.vjp(function, *a))(*args)
    return sum(a.nbytes for a in jax.tree.leaves(pullback)) / args[-1].nbytes


def count_collectives(function: Callable, *args: Any) -> int:
    """Number of collectives in the compiled program of `function`.

    Example:
      >>> import jax.numpy as jnp
      >>> count_collectives(lambda x: x.sum(), jnp.ones(8))
      0
    """
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    return len(re.findall(rf"= [^=]*\b(?:{names})(?:-start)?\(", text))


def with_axis_name(method: Any, axis_name: str | tuple[str, ...]) -> Any:
    """`method` with its batch statistics shared over `axis_name`.

    Example:
      >>> import normjax as nj
      >>> with_axis_name(nj.Ghost(nj.BatchNorm(), groups=2), "batch").method.axis_name
      'batch'
    """
    if not checks.depends_on_train(method):
        return method
    if hasattr(method, "axis_name"):
        return dataclasses.replace(method, axis_name=axis_name)
    if hasattr(method, "method"):
        return dataclasses.replace(method, method=with_axis_name(method.method, axis_name))
    if hasattr(method, "methods"):
        parts = tuple(with_axis_name(part, axis_name) for part in method.methods)
        return dataclasses.replace(method, methods=parts)
    return method


def _structure(subject: Subject) -> None:
    """Configuration, parameters, state, dtypes of the output, evaluation, no retrace."""
    method = subject.method
    twin = copy.copy(method)
    assert (twin, hash(twin)) == (method, hash(method)), f"a copy of {method!r} is not equal to it"
    params, state = subject.variables()
    assert isinstance(to_dict(params) | to_dict(state), dict)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = subject.inputs(dtype)
        for train in (True, False):
            y, new = subject.apply(params, state, x, train=train)
            wanted = getattr(method, "dtype", None) or dtype
            chex.assert_shape(y, subject.shape)
            assert y.dtype == wanted, f"{jnp.dtype(dtype)} in gives {y.dtype} out"
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            weak = [a.weak_type for a in jax.tree.leaves(new)]
            assert not any(weak), "the state comes back weakly typed"
            if not train:
                chex.assert_trees_all_equal(new, state)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        return subject.apply(params, state, x)

    chex.clear_trace_counter()
    _, state = step(params, state, subject.inputs())
    step(params, state, subject.inputs(seed=5))


def _masks(subject: Subject) -> None:
    """A mask equals dropping rows; what is masked reaches nothing; an empty mask is harmless."""
    with jax.enable_x64(True):
        params, state = subject.variables(jnp.float64)
        x, mask = subject.inputs(jnp.float64), subject.rows()
        weight = subject.inputs(jnp.float64, seed=4)
        spoilt = jnp.where(mask, x, jnp.nan)

        def loss(params, x, mask, weight):
            y, new = subject.apply(params, state, x, mask)
            y = y if mask is None else jnp.where(mask, y, 0)
            return jnp.sum(y * weight), (y, new)

        gradients = _jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        clean = gradients(params, x, mask, weight)
        chex.assert_trees_all_close(gradients(params, spoilt, mask, weight), clean, **EXACT)
        chex.assert_tree_all_finite(clean)
        outside = jnp.where(mask, 0, clean[1][1])
        chex.assert_trees_all_equal(outside, jnp.zeros_like(outside))

        if subject.drops_rows:
            rows = np.flatnonzero(np.asarray(mask))
            few = gradients(params, x[rows], None, weight[rows])
            (_, (y, new)), (dparams, dx) = few
            chex.assert_trees_all_close(clean[0][1][0][rows], y, **EXACT)
            chex.assert_trees_all_close((clean[0][1][1], clean[1][0]), (new, dparams), **EXACT)
            chex.assert_trees_all_close(clean[1][1][rows], dx, **EXACT)

        scattered = subject.shape if subject.masks_positions else mask.shape
        everywhere = jax.random.bernoulli(jax.random.key(6), 0.6, scattered)
        holes = jnp.where(everywhere, x, jnp.nan)
        chex.assert_tree_all_finite(gradients(params, holes, everywhere, weight))
        whole = gradients(params, x, jnp.ones_like(mask), weight)
        chex.assert_trees_all_close(whole, gradients(params, x, None, weight), **EXACT)

        y, new = subject.apply(params, state, spoilt, jnp.zeros_like(mask))
        chex.assert_tree_all_finite(y)
        chex.assert_trees_all_close(new, state, **EXACT)
        nothing = _jit(jax.grad(lambda x, no: jnp.sum(subject.apply(params, state, x, no)[0])))
        chex.assert_trees_all_equal(nothing(x, mask & False), jnp.zeros_like(x))


def _numbers(subject: Subject) -> None:
    """Half precision rounds once, offsets are harmless, constants have finite derivatives."""
    params, state = subject.variables()
    run, exactly = jax.jit(subject.apply), _in_float64(subject)
    for dtype in (jnp.bfloat16, jnp.float16):
        x = subject.inputs(dtype)
        y, _ = run(params, state, x)
        exact = exactly(params, state, x)
        rounded = exact.astype(y.dtype).astype(np.float64)
        rounding = np.sqrt(np.mean(np.square(rounded - exact)) * subject.roundings)
        error = np.sqrt(np.mean(np.square(np.asarray(y, np.float64) - exact)))
        allowed = 1.2 * rounding
        assert error <= allowed, f"{jnp.dtype(dtype)}: error {error:.3g}, {allowed:.3g} allowed"

    for offset in (0.0, 1e2, 1e4):
        x = subject.inputs() + offset
        y, _ = run(params, state, x)
        exact = exactly(params, state, x)
        error = np.max(np.abs(np.asarray(y, np.float64) - exact)) / max(np.max(np.abs(exact)), 1)
        limit = 2e-6 + 2e-7 * offset
        assert error <= limit, f"offset {offset:g}: relative error {error:.3g} > {limit:.3g}"

    def loss(x):
        return jnp.sum(subject.apply(params, state, x)[0] ** 2)

    derivatives = _jit(lambda x, dx: jax.jvp(jax.grad(loss), (x,), (dx,)))
    for x in (jnp.zeros(subject.shape), jnp.full(subject.shape, 3.0)):
        chex.assert_tree_all_finite(derivatives(x, subject.inputs()))


def _in_float64(subject):
    """The output as a function of variables and input, computed in float64."""
    run = _jit(lambda *args: subject.apply(*args)[0])

    def exactly(*args):
        with jax.enable_x64(True):
            args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), args)
            return np.asarray(run(*args))

    return exactly


def _jit(function):
    """Compiled fast, not to be fast: for large programs that run once, on a few numbers."""
    cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if cpu else None
    return jax.jit(function, compiler_options=options)


def _derivatives(subject: Subject) -> None:
    """Every mode of differentiation, to third order, equals plain autodiff in float64."""
    with jax.enable_x64(True):
        params, state = subject.variables(jnp.float64)
        x = subject.inputs(jnp.float64)
        spoilt = jnp.where(subject.rows(), x, jnp.nan)
        for data, mask in ((x, None), (spoilt, subject.rows())):
            ours = _jit(lambda *a: _all_derivatives(subject, *a))(params, state, data, mask)
            with plain_derivatives():
                plain = _jit(lambda *a: _all_derivatives(subject, *a))(params, state, data, mask)
            chex.assert_tree_all_finite(ours)
            chex.assert_trees_all_close(ours, plain, **EXACT)


def _all_derivatives(subject, params, state, x, mask):
    """Values and derivatives of all kinds along fixed directions, as one tree."""
    weight = subject.inputs(x.dtype, seed=8)
    u, v, w = (
        jax.tree.map(
            lambda a, s=s: jnp.cos(s + 0.1 * jnp.arange(a.size)).reshape(a.shape), (params, x)
        )
        for s in (0.0, 1.0, 2.0)
    )

    def output(params, x):
        y, new = subject.apply(params, state, x, mask)
        return y if mask is None else jnp.where(mask, y, 0), new

    def loss(params, x):
        y, new = output(params, x)
        return jnp.sum(jnp.sin(y) * weight[: y.shape[0]]) + sum(map(jnp.sum, jax.tree.leaves(new)))

    def along(function, direction):
        return lambda *at: jax.jvp(function, at, direction)[1]

    def dot(gradient, direction):
        return sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(direction)))

    point = (params, x)
    gradient = jax.grad(loss, (0, 1))
    forward = jax.jvp(output, point, u)
    linearized = jax.linearize(output, *point)[1](*u)
    few = x[:2] if mask is None else x[:8]
    small = None if mask is None else mask[:8]

    def sample(row):
        y, _ = subject.apply(params, state, few.at[0].set(row), small)
        return jnp.sum(
            jnp.sin(y if small is None else jnp.where(small, y, 0)) * weight[: few.shape[0]]
        )

    def scanned(x):
        step = lambda carry, _: (subject.apply(params, carry, x, mask)[1], output(params, x)[0])
        return lax.scan(step, state, None, length=2)

    results = {
        "value": output(*point),
        "jvp": forward,
        "linearize": linearized,
        "grad": gradient(*point),
        "jvp of jvp": along(along(loss, u), v)(*point),
        "jvp of grad": along(gradient, u)(*point),
        "grad of jvp": jax.grad(along(loss, u), (0, 1))(*point),
        "grad of grad": jax.grad(lambda *at: dot(gradient(*at), u), (0, 1))(*point),
        "third": along(along(gradient, u), v)(*point),
        "third, reverse": jax.grad(lambda *at: dot(along(gradient, v)(*at), w), (0, 1))(*point),
        "remat": jax.grad(jax.checkpoint(loss), (0, 1))(*point),
        "jit": jax.jit(gradient)(*point),
        "scan": jax.value_and_grad(lambda x: jnp.sum(scanned(x)[1] * weight[None]))(x),
    }
    row = few.reshape(few.shape[0], -1)[0] if few.ndim == 1 else few[0]
    if row.size <= 64 and subject.drops_rows:
        row = jnp.where(jnp.isnan(row), 0, row)
        results |= {
            "jacfwd": jax.jacfwd(sample)(row),
            "jacrev": jax.jacrev(sample)(row),
            "hessian": jax.hessian(sample)(row),
        }
    several = jnp.stack([x, 2 * x, x - 1])
    results["vmap of grad"] = jax.vmap(gradient, (None, 0))(params, several)
    results["grad of vmap"] = jax.grad(
        lambda s: jnp.sum(jax.vmap(loss, (None, 0))(params, s) ** 2)
    )(several)
    return results


def _transforms(subject: Subject) -> None:
    """Ensembles by vmap, steps by scan, and remat give the state and output of eager calls."""
    with jax.enable_x64(True):
        params, state = subject.variables(jnp.float64)
        batches = jnp.stack([subject.inputs(jnp.float64, seed) for seed in (2, 3, 4)])
        carry, outputs = state, []
        for x in batches:
            y, carry = subject.apply(params, carry, x)
            outputs.append(y)
        steps = lambda s, x: subject.apply(params, s, x)[::-1]
        chex.assert_trees_all_close(
            lax.scan(steps, state, batches), (carry, jnp.stack(outputs)), **EXACT
        )

        copies = jax.tree.map(lambda a: jnp.stack([a, 2 * a, a + 1]), (params, state))
        together = jax.vmap(subject.apply)(copies[0], copies[1], batches)
        for i in range(3):
            one = jax.tree.map(lambda a, i=i: a[i], copies)
            alone = subject.apply(one[0], one[1], batches[i])
            chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], together), alone, **EXACT)

        again = jax.checkpoint(subject.apply)(params, state, batches[0])
        chex.assert_trees_all_close(again, subject.apply(params, state, batches[0]), **EXACT)


def _devices(subject: Subject) -> None:
    """Sharded equals unsharded under jit, shard_map, pmap and vmap, with ragged masks."""
    devices = jax.devices()
    if len(devices) < 2 or subject.shape[0] % len(devices):
        raise ValueError(
            f"check_method: a batch of {subject.shape[0]} cannot be divided among {len(devices)} "
            "devices; two or more are needed."
        )
    with jax.enable_x64(True):
        variables = subject.variables(jnp.float64)
        x = subject.inputs(jnp.float64)
        weight = subject.inputs(jnp.float64, seed=4)
        for mask in (None, subject.rows()):
            data = x if mask is None else jnp.where(mask, x, jnp.nan)
            wanted = _everything(subject, subject.method)(*variables, data, mask, weight)
            for name, run in _mapped(subject).items():
                got = run(*variables, data, mask, weight)
                where = f"{name}, {'masked' if mask is not None else 'no mask'}"
                chex.assert_trees_all_close(got, wanted, custom_message=where, **EXACT)


def _everything(subject, method, reduce=lambda tree: tree, local=lambda tree: tree):
    """Output, state, gradients, a tangent and a second derivative, as a function of data.

    `reduce` sums gradients of parameters over devices; `local` marks parameters as a device's own.
    """

    def run(params, state, x, mask, weight):
        def output(params, x):
            y, new = subject.apply(params, state, x, mask, method=method)
            return (y if mask is None else jnp.where(mask, y, 0)), new

        def loss(params, x):
            return jnp.sum(jnp.sin(output(params, x)[0]) * weight)

        own = local(params)
        gradient = jax.grad(loss, (0, 1))
        direction = jax.tree.map(jnp.cos, own), jnp.where(jnp.isnan(x), 0, jnp.sin(3 * x))
        gradients, second = jax.jvp(gradient, (own, x), direction)
        tangent = jax.jvp(lambda *at: output(*at)[0], (own, x), direction)[1]
        y, new = output(params, x)
        pairs = {"grad": gradients, "second": second}
        reduced = {name: (reduce(dparams), dx) for name, (dparams, dx) in pairs.items()}
        return {"y": y, "state": new, "jvp": tangent, **reduced}

    return run


def _mapped(subject):
    """Ways to run `_everything` on all devices, by name."""
    number = jax.device_count()
    method = with_axis_name(subject.method, AXIS)
    plain = _everything(subject, subject.method)
    total = lambda tree: jax.tree.map(lambda a: lax.psum(a, AXIS), tree)
    vary = lambda tree: jax.tree.map(lambda a: lax.pcast(a, (AXIS,), to="varying"), tree)
    everything = _everything(subject, method, reduce=total)
    checked = _everything(subject, method, reduce=total, local=vary)
    rows, whole = PartitionSpec(AXIS), PartitionSpec()
    out = {"y": rows, "state": whole, "jvp": rows, "grad": (whole, rows), "second": (whole, rows)}

    def jitted(kind):
        def run(params, state, *data):
            mesh = jax.make_mesh((number,), (AXIS,), axis_types=(kind,))
            with jax.set_mesh(mesh):
                put = lambda a: jax.device_put(a, NamedSharding(mesh, rows))
                params, state = jax.device_put((params, state), NamedSharding(mesh, whole))
                data = jax.tree.map(put, data)
                result = _jit(plain)(params, state, *data)
                for a, b in zip(*map(jax.tree.leaves, (result["state"], state)), strict=True):
                    assert jax.typeof(a) == jax.typeof(b), f"{jax.typeof(b)} became {jax.typeof(a)}"
            return result

        return run

    def sharded(check):
        def run(params, state, x, mask, weight):
            mesh = Mesh(np.array(jax.devices()), (AXIS,))
            specs = (whole, whole, rows, None if mask is None else rows, rows)
            function = checked if check else everything
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check
            )
            return _jit(mapped)(params, state, x, mask, weight)

        return run

    def split(tree):
        return jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), tree)

    def join(result):
        merge = lambda a: a.reshape(-1, *a.shape[2:])
        first = lambda tree: jax.tree.map(lambda a: a[0], tree)
        pair = lambda both: (first(both[0]), merge(both[1]))
        pairs = {name: pair(result[name]) for name in ("grad", "second")}
        state = first(result["state"])
        return {"y": merge(result["y"]), "state": state, "jvp": merge(result["jvp"]), **pairs}

    def mapped_by(transform):
        def run(params, state, *data):
            # A closure: `pmap` takes no argument without arrays, such as variables of none.
            one = lambda data: everything(params, state, *data)
            return join(transform(one, axis_name=AXIS)(split(data)))

        return run

    return {
        "jit, Auto": jitted(AxisType.Auto),
        "jit, Explicit": jitted(AxisType.Explicit),
        "shard_map, checks on": sharded(True),
        "shard_map, checks off": sharded(False),
        "pmap": mapped_by(jax.pmap),
        "vmap": mapped_by(jax.vmap),
    }


def _collectives(subject: Subject) -> None:
    """Under a named axis at most `collectives` forward and as many more backward."""
    method = with_axis_name(subject.method, AXIS)
    params, state = subject.variables()
    x = subject.inputs()
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    rows, whole = PartitionSpec(AXIS), PartitionSpec()

    def forward(params, state, x):
        return subject.apply(params, state, x, method=method)

    def backward(params, state, x):
        varying = jax.tree.map(lambda a: lax.pcast(a, (AXIS,), to="varying"), params)

        def loss(x):
            y, new = subject.apply(varying, state, x, method=method)
            # Of every device: with its own parameters, the state may be its own.
            return jnp.sum(jnp.sin(y)), jax.tree.map(lambda a: a[None], new)

        return jax.grad(loss, has_aux=True)(x)

    allowed = subject.collectives
    for function, state_spec, limit in ((forward, whole, allowed), (backward, rows, 2 * allowed)):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=(whole, whole, rows), out_specs=(rows, state_spec)
        )
        number = count_collectives(mapped, params, state, x)
        assert number <= limit, f"{function.__name__}: {number} collectives, {limit} allowed"


def _memory(subject: Subject) -> None:
    """Reverse mode keeps at most `residual_bytes` per byte of input, in float32 and bfloat16."""
    if subject.residual_bytes is None:
        return
    at = {i % len(subject.shape) for i in np.atleast_1d(checks.feature_axes(subject.method))}
    batch, positions = (1, 8) if subject.fits_positions else (32, 1)
    factor = [32 if i in at else positions if i else batch for i in range(len(subject.shape))]
    larger = dataclasses.replace(subject, shape=tuple(np.multiply(subject.shape, factor).tolist()))
    params, state = larger.variables()
    small = sum(a.nbytes for a in jax.tree.leaves((params, state)))
    for dtype in (jnp.float32, jnp.bfloat16):
        x = larger.inputs(dtype)
        for mask in (None, larger.rows()):
            output = lambda p, x, mask=mask: larger.apply(p, state, x, mask)[0]
            kept = residual_bytes(output, params, x) - 4 * small / x.nbytes
            assert kept <= subject.residual_bytes, (
                f"{jnp.dtype(dtype)}, {'no ' if mask is None else ''}mask: {kept:.2f} bytes kept "
                f"per byte, {subject.residual_bytes} allowed"
            )


def _export(subject: Subject) -> None:
    """Forward and backward pass lower for TPU and CUDA, without the CPU's optimization barriers."""
    params, state = subject.variables()

    def step(params, state, x):
        def loss(params, x):
            y, new = subject.apply(params, state, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), new

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    for platform in ("tpu", "cuda"):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = subject.inputs(dtype)
            text = export.export(jax.jit(step), platforms=(platform,))(
                params, state, x
            ).mlir_module()
            assert text, platform


CHECKS: dict[str, Callable[[Subject], None]] = {
    "structure": _structure,
    "masks": _masks,
    "numbers": _numbers,
    "derivatives": _derivatives,
    "transforms": _transforms,
    "devices": _devices,
    "collectives": _collectives,
    "memory": _memory,
    "export": _export,
}
