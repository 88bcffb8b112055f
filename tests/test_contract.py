"""Every check of the contract for every line of the table."""

import pytest
from cases import CASES, KERNELS

from normjax.core import compat
from normjax.testing import CHECKS, has_check

LONG = ("all devices",)
ALSO_LONG_IN_TIER_2 = (
    "numbers",
    "derivatives",  # of the same passes as the first line of the method
    "second derivatives",
    "transforms",
    "devices",
    "collectives",
    "export",  # tests/test_situations.py exports every line with symbolic sizes
)


def rows():
    """All pairs; what the tier of a line does not ask for at every push is slow."""
    for name, case in (CASES | KERNELS).items():
        long = LONG if case.tier == 1 else (*LONG, *ALSO_LONG_IN_TIER_2)
        if case.tier == 2 and not case.keeps_rounded:
            long += ("gradients",)
        for check in (name for name in CHECKS if has_check(case, name)):
            marks = [pytest.mark.slow] if check in long else []
            yield pytest.param(case, check, marks=marks, id=f"{name}-{check}")


@pytest.mark.parametrize(("case", "check"), list(rows()))
def test_contract(case, check):
    if check == "memory" and (compat.PLAIN or not compat.HAS_PRIMITIVES):
        pytest.skip("autodiff of the formulas keeps more than the rules of the passes do")
    CHECKS[check](case)
