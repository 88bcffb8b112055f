"""The contract of a normalization: `check_method` puts a method through every promise."""

from collections.abc import Callable, Iterable
from typing import Any

from normjax.core.compat import plain_derivatives
from normjax.testing import derivatives, devices, masks, numbers, structure
from normjax.testing.derivatives import derivative_gaps
from normjax.testing.measure import count_collectives, residual_bytes
from normjax.testing.subject import Subject, with_axis_name

__all__ = [
    "Subject",
    "check_method",
    "count_collectives",
    "derivative_gaps",
    "has_check",
    "plain_derivatives",
    "residual_bytes",
    "with_axis_name",
]

CHECKS: dict[str, Callable[[Subject], None]] = {
    "structure": structure.check,
    "masks": masks.check,
    "numbers": numbers.check,
    "gradients": numbers.check_gradients,
    "derivatives": derivatives.check,
    "second derivatives": derivatives.check_second,
    "transforms": derivatives.check_transforms,
    "devices": devices.check,
    "all devices": devices.check_all,
    "collectives": devices.check_collectives,
    "memory": structure.check_memory,
    "export": structure.check_export,
}


def has_check(subject: Subject, name: str) -> bool:
    """Whether a check is for a method: those over kernels take no masks.

    Example:
      >>> import normjax as nj
      >>> has_check(Subject(nj.WeightNorm(), (8, 4)), "masks")
      False
    """
    return not (subject.over_kernels and name == "masks")


def check_method(
    method: Any,
    shape: tuple[int, ...],
    *,
    only: Iterable[str] = tuple(CHECKS),
    skip: Iterable[str] = (),
    **promises: Any,
) -> list[str]:
    """Puts a method through the contract; returns the names of the checks that ran.

    `shape` is that of an input, the batch first, or of a kernel; `only` and `skip` are names of
    checks to run and not to run, of `CHECKS` (else ValueError); `promises` are the other fields of
    `Subject`, such as `residual_bytes`. AssertionError at the first promise that does not hold.

    Checks that need devices use all there are, two or more, by which the batch can be divided;
    where there is one, simulate several with `XLA_FLAGS=--xla_force_host_platform_device_count=8`.
    Under mapped axes a method that trains gets `axis_name` set, in itself or in its parts.

    Example:
      >>> import normjax as nj
      >>> check_method(nj.BatchNorm(), (16, 4), only=("structure", "derivatives"))
      ['structure', 'derivatives']
    """
    only, skip = list(only), list(skip)
    for name in (*only, *skip):
        if name not in CHECKS:
            raise ValueError(f"check_method: {name!r} is not one of {', '.join(CHECKS)}.")
    subject = Subject(method, shape, **promises)
    chosen = [name for name in only if name not in skip and has_check(subject, name)]
    for name in chosen:
        CHECKS[name](subject)
    return chosen
