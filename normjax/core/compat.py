"""Every internal of JAX that the package touches, with what serves where JAX lacks it.

Where a release of JAX drops or changes one, results stay right, and one warning says what is
missing and what it costs. No other file of the package names an internal.

With the environment variable `NORMJAX_PLAIN=1`, read at import, all passes are plain functions of
JAX's own primitives, without rules and schedules of their own: for bisecting a fault, and for tools
that know no other primitives. `plain_derivatives()` does it for a while.
"""

import contextlib
import contextvars
import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

PLAIN = os.environ.get("NORMJAX_PLAIN", "0") not in ("", "0")
_plain = contextvars.ContextVar("plain", default=PLAIN)


@contextlib.contextmanager
def plain_derivatives() -> Iterator[None]:
    """While it is open, what is traced anew is differentiated by plain autodiff of the formulas.

    It is for tools that know JAX's own primitives only. It drops all traces that JAX has cached,
    before and after.

    Example:
      >>> import jax, normjax as nj
      >>> params, state = nj.LayerNorm().init(None, 3)
      >>> loss = lambda x: (nj.LayerNorm().apply(params, state, x, train=True)[0] ** 3).sum()
      >>> with plain_derivatives():
      ...     print(jax.grad(loss)(jax.numpy.ones((2, 3))).shape)
      (2, 3)
    """
    token = _plain.set(True)
    jax.clear_caches()
    try:
        yield
    finally:
        _plain.reset(token)
        jax.clear_caches()


def is_plain() -> bool:
    """Whether passes have no rules of their own."""
    return _plain.get()


_told: set[str] = set()


def _without(internal, cost):
    """Warns, once for each cost."""
    if cost not in _told:
        _told.add(cost)
        warnings.warn(
            f"normjax finds an internal of JAX {jax.__version__} changed: {internal}. "
            f"Results stay right, but {cost}.",
            RuntimeWarning,
            stacklevel=3,
        )


_varying = operator.attrgetter("manual_axis_type.varying")
AUTODIFF = "passes are differentiated by autodiff, which takes more time and memory"
try:
    from jax.extend.core import Primitive
    from jax.interpreters.ad import Zero as Zero
    from jax.interpreters.ad import instantiate_zeros as instantiate_zeros
    from jax.interpreters.ad import is_undefined_primal, primitive_jvps, primitive_transposes
    from jax.interpreters.batching import bdim_at_front as bdim_at_front
    from jax.interpreters.batching import primitive_batchers
    from jax.interpreters.mlir import lower_fun, register_lowering

    _varying(jax.typeof(np.zeros(())))
    HAS_PRIMITIVES = True
except (ImportError, AttributeError) as error:
    HAS_PRIMITIVES = False
    _without(error, AUTODIFF)


def register(
    name: str,
    evaluate: Callable,
    *,
    abstract: Callable,
    batch: Callable,
    jvp: Callable | None = None,
    transpose: Callable | None = None,
    on_cpu: Callable[[bool, bool], Callable] | None = None,
    on_gpu: Callable[[bool, bool], Callable] | None = None,
    on_tpu: Callable[[bool, bool], Callable] | None = None,
) -> Callable:
    """A function that binds a new primitive with these rules, or `evaluate` where JAX refuses.

    `evaluate` returns a list. `on_cpu(alone, exported)` gives the function that stands for it in
    programs for CPUs, and so on. `alone`: nobody divides its arrays, be the program for one device
    or, for each device, what shard_map gives it.
    """
    if not HAS_PRIMITIVES:
        return evaluate
    try:
        primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(evaluate)
        primitive.def_abstract_eval(abstract)
        primitive_batchers[primitive] = batch
        if jvp is not None:
            primitive_jvps[primitive] = jvp
        if transpose is not None:
            primitive_transposes[primitive] = transpose
        register_lowering(primitive, lower_fun(evaluate, multiple_results=True))
        for platform, on in (("cpu", on_cpu), ("gpu", on_gpu), ("tpu", on_tpu)):
            if on is not None:
                register_lowering(primitive, functools.partial(_lower, on), platform=platform)
        return primitive.bind
    except Exception as error:
        _without(error, AUTODIFF)
        return evaluate


def _lower(on, context, *args, **params):
    try:
        module = context.module_context
        axes = module.axis_context
        manual = getattr(axes, "manual_axes", ())
        alone = manual.issuperset(axes.mesh.axis_names) if manual else axes.num_devices == 1
        program = alone, module.lowering_parameters.for_export
    except AttributeError as error:
        _without(error, "sums and transforms take longer on CPUs")
        program = False, True
    return lower_fun(on(*program), multiple_results=True)(context, *args, **params)


def kind(a: Any) -> Any:
    """The type of an array, or of what stands for an operand where JAX transposes."""
    return a.aval if HAS_PRIMITIVES and is_undefined_primal(a) else jax.typeof(a)


def varying(a: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which `a` varies; none where JAX does not say."""
    return _varying(jax.typeof(a)) if HAS_PRIMITIVES else frozenset()


def is_sum(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: sums are kept. By another name they would be made again."""
    return primitive.name in ("normjax_sums", "reduce_sum", "psum", "psum_invariant")


def is_costly(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: sums over devices, eigenvalues and Cholesky factors are kept.

    By another name they would be made again.
    """
    return primitive.name in ("psum", "psum_invariant", "eigh", "cholesky")


def factors(primitive: Any, *operands: Any, **params: Any) -> int:
    """How many products are summed to a number of a convolution or a matrix product; else 0."""
    numbers: Any = params.get("dimension_numbers")
    try:
        if primitive.name == "dot_general":
            (contracted, _), _ = numbers
            return math.prod(operands[0].shape[i] for i in contracted)
        if primitive.name == "conv_general_dilated":
            kernel = operands[1].shape
            return math.prod(kernel) // max(kernel[numbers.rhs_spec[0]], 1)
    except (AttributeError, TypeError, ValueError) as error:
        _without(error, "checkpoint_policy keeps no products")
    return 0


def evaluate(primitive: Any, params: Any, *operands: Any) -> list[Any]:
    """The results of a step of a traced program, whose fields are `params`."""
    known = getattr(primitive, "get_bind_params", dict)  # some primitives take others
    results = primitive.bind(*operands, **known(params))
    return list(results) if primitive.multiple_results else [results]


try:
    from jax.experimental.layout import Layout, with_layout_constraint
except ImportError as error:
    Layout = None
    _without(error, "transforms copy arrays once more on CPUs")


def in_order(x: jax.Array) -> jax.Array:
    """`x` with its last axis minor in memory; unchanged where JAX cannot say so."""
    if Layout is None or jax.__version_info__ < (0, 12):  # that gathers whole arrays for it
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


try:
    from jax.core import Tracer
except ImportError as error:
    Tracer = ()
    _without(error, "errors about traced fields are JAX's own")


def is_traced(a: Any) -> bool:
    """Whether `a` is known only when a program runs."""
    return isinstance(a, Tracer)
