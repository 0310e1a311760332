"""Tests run again in a process of their own, where the environment selects other parts of vLLM."""

import os
import re
import subprocess
import sys

from helpers import ROOT

LIMIT = 1100  # seconds; these machines are shared


def rerun(count: int, path: str, names: str, **environment: str) -> None:
    """The tests under ``tests/<path>`` that ``names`` selects pass, and they are ``count``."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/{path}", "-k", names],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    shown = result.stdout[-5000:]
    assert result.returncode == 0, shown
    assert re.search(rf"^{count} passed(, \d+ deselected)?,", shown, re.MULTILINE), shown
