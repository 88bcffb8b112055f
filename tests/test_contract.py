"""Every check of the contract for every line of the table."""

import pytest
from cases import CASES

from normjax.testing import CHECKS

LONG = ("derivatives", "devices")


def rows():
    """All pairs; of variants of a method the long checks are marked slow.

    `GhostBatchNorm` stands for `Ghost`, whose lines are variants.
    """
    for case in CASES:
        for check in CHECKS:
            marks = [pytest.mark.slow] if "," in case and check in LONG else []
            yield pytest.param(case, check, marks=marks, id=f"{case}-{check}")


@pytest.mark.parametrize(("case", "check"), list(rows()))
def test_contract(case, check):
    CHECKS[check](CASES[case])
