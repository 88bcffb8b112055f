"""Every check of the contract for every line of the table."""

import pytest
from cases import CASES

from normjax.testing import CHECKS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_contract(case, check):
    CHECKS[check](CASES[case])
