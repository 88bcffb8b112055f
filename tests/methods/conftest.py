import pytest


@pytest.fixture(autouse=True)
def _strict_promotion(strict_promotion):
    """Every test of a method runs without implicit dtype promotion."""
