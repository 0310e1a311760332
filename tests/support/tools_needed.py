"""Programs that some tests need and pip does not bring."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

REQUIRED = "SEPLLM_REQUIRE_TOOLS"


def missing(reason: str) -> NoReturn:
    """Skip, or fail where everything has to be there."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1 is set, and {reason}")
    pytest.skip(reason)


def program(*names: str, package: str) -> str:
    """Path of the first of these programs that there is, of a package of Debian."""
    found = next((path for path in map(shutil.which, names) if path), None)
    return found or missing(f"needs {names[0]} (Debian: apt install {package})")
