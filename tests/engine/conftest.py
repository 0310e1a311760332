"""What all tests of this tier need."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def of_this_tier(inspected_here: None) -> None:
    """Models are looked at in this process."""
