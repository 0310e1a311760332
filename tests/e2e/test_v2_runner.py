"""vLLM's V2 model runner, the default on CUDA, passes tests of this suite too.

On a CPU its Triton kernels run in the interpreter, so these are the quicker tests of each kind;
CONTRIBUTING says how to run others.
"""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.e2e

SYNCHRONOUS = {
    "chunks and mixed batches": (3, "test_exactness.py", "64-4-32 or 3000 or come_while"),
    "preemption and aborts": (
        4,
        "test_request_interruptions.py",
        "aborts_in_every or overtake or least_urgent or reset",
    ),
    "prefix hits": (2, "test_prefix_caching.py", "64-4-32 or turns"),
    "drafts": (1, "test_speculation.py", "64-32"),
}
ASYNCHRONOUS = {
    "prefix hits and eviction": (2, "test_prefix_caching.py", "64-4-32 or pressure"),
    "random traffic": (1, "test_soak.py", "7"),
}


def run(count, file, names, **environment):
    """The tests of ``file`` that ``names`` selects pass, and they are ``count``."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/e2e/{file}", "-k", names],
        cwd=ROOT,
        env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    shown = result.stdout[-5000:]
    assert result.returncode == 0, shown
    assert re.search(rf"^{count} passed, \d+ deselected", shown, re.MULTILINE), shown


@pytest.mark.parametrize("kind", SYNCHRONOUS)
def test_synchronous(kind):
    run(*SYNCHRONOUS[kind])


@pytest.mark.parametrize("kind", ASYNCHRONOUS)
def test_asynchronous(kind):
    """Steps are scheduled before the tokens of the one before are known."""
    run(*ASYNCHRONOUS[kind], SEPLLM_TEST_ASYNC_SCHEDULING="1")
