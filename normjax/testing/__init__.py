"""The contract of a normalization: `check_method` puts a method through every promise.

The project's own tests call it for every method; call it for one of your own.
"""

from collections.abc import Callable, Iterable
from typing import Any

from normjax.core.linear import plain_derivatives
from normjax.testing import derivatives, devices, export, masks, memory, numbers, structure
from normjax.testing.derivatives import adjoint_gap, slope_gap
from normjax.testing.measure import count_collectives, residual_bytes
from normjax.testing.subject import Subject, with_axis_name

__all__ = [
    "Subject",
    "adjoint_gap",
    "check_method",
    "count_collectives",
    "plain_derivatives",
    "residual_bytes",
    "slope_gap",
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
    "memory": memory.check,
    "export": export.check,
}


def check_method(
    method: Any,
    shape: tuple[int, ...],
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    **promises: Any,
) -> list[str]:
    """Puts a method through the contract.

    Checks that need devices use all there are, two or more; where there is one, simulate several
    with `XLA_FLAGS=--xla_force_host_platform_device_count=8`.

    Args:
      method: an object with `init` and `apply`. Under mapped axes a method that differs between
        training and evaluation gets `axis_name` set, in itself or in the methods that it is made
        of.
      shape: shape of an input, the batch first; the number of devices must divide the batch.
      only: names of the checks to run, of `CHECKS`; None: all.
      skip: names of checks not to run.
      **promises: the other fields of `Subject`, such as `residual_bytes`.

    Returns:
      The names of the checks that ran.

    Raises:
      AssertionError: at the first promise that does not hold.
      ValueError: for an unknown check.

    Example:
      >>> import normjax as nj
      >>> check_method(nj.BatchNorm(), (16, 4), only=("structure", "derivatives"))
      ['structure', 'derivatives']
    """
    chosen = list(CHECKS) if only is None else list(only)
    for name in (*chosen, *skip):
        if name not in CHECKS:
            raise ValueError(f"check_method: {name!r} is not one of {', '.join(CHECKS)}.")
    chosen = [name for name in chosen if name not in set(skip)]
    subject = Subject(method, shape, **promises)
    for name in chosen:
        CHECKS[name](subject)
    return chosen
