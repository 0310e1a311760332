"""The interpreter takes what the compiler does not: every kernel is compiled for GPUs too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

SCRIPT = Path(__file__).parent / "compile_for_gpus.py"
SHARED_MEMORY = {90: 227 << 10, 80: 163 << 10}  # bytes that one program may have


@pytest.fixture(scope="module")
def compiled():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_all_kernels_compile(compiled):
    names = {kernel["kernel"] for kernel in compiled}
    assert names == {
        "_decode",
        "_merge",
        "_prefill",
        "_kept_metadata",
        "_write_kv",
        "_turn_queries",
    }
    for kernel in compiled:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]], kernel


def test_attention_loads_ahead(compiled):
    """Keys and values are copied while others are computed with, and on an H200 registers suffice
    for usual heads."""
    for kernel in compiled:
        if kernel["kernel"] in ("_decode", "_prefill"):
            assert kernel["copies"] > 0, kernel
            if kernel["capability"] == 90 and kernel["constants"]["HEAD_SIZE"] <= 128:
                assert kernel["spilled"] == 0, kernel
