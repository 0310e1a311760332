"""The interpreter takes what the compiler does not: every kernel is compiled for GPUs too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_for_gpus import SHARED_MEMORY
from sepllm_kernels.batch import STEP_INDEX, STEP_SIZES
from sepllm_kernels.sequence.packed.kernels import SIZES

LIMIT = 1100  # seconds; these machines are shared
pytestmark = [pytest.mark.kernels, pytest.mark.timeout(LIMIT + 60)]

SCRIPT = Path(__file__).parent / "compile_for_gpus.py"


@pytest.fixture(scope="module")
def compiled():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_all_kernels_compile(compiled):
    names = {kernel["kernel"] for kernel in compiled}
    assert names == {
        "_decode",
        "_decode_plan",
        "_merge",
        "_prefill",
        "_kept_metadata",
        "_write_kv",
        "_rotate_queries",
        "_packed_forward",
        "_packed_query_gradient",
        "_packed_key_gradient",
        "_packed_deltas",
    }
    for kernel in compiled:
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]], kernel


def test_no_step_compiles_a_kernel_anew(compiled):
    """Sizes are 1 or a multiple of 16 in some steps, and prompts begin anywhere in a batch."""
    for kernel in compiled:
        varying = {*STEP_SIZES, *SIZES, *(STEP_INDEX if kernel["kernel"] == "_prefill" else ())}
        assert not varying & {*kernel["specialized"]}, kernel


def test_attention_loads_ahead(compiled):
    """Keys and values are copied while others are computed with, and on an H200 registers suffice
    for usual heads and types."""
    for kernel in compiled:
        if kernel["kernel"] in ("_decode", "_prefill"):
            is_wide = kernel["constants"]["HEAD_SIZE"] > 128
            usual, is_h200 = not is_wide and kernel["pages"] != "*fp32", kernel["capability"] == 90
            if is_h200:
                assert kernel["launch"] == 0, kernel
            if usual or is_h200:
                assert kernel["tiles"] >= 2, kernel
            if usual and is_h200:
                assert kernel["spilled"] == 0, kernel


def test_decode_waits_for_memory(compiled):
    """An H200's memory delivers 4.8 TB/s to 132 processors at 1.755 GHz (NVIDIA's data sheet, boost
    clock of the H100 SXM): 20.7 bytes per processor and cycle. In a cycle a processor issues four
    instructions, of which decode must leave a third over."""
    found = set()
    for kernel in compiled:
        pages, constants = kernel["pages"], kernel["constants"]
        shape = kernel["capability"], constants.get("HEAD_SIZE"), constants.get("ROWS")
        if kernel["kernel"] != "_decode" or shape != (90, 128, 16) or constants["SOFT_CAP"]:
            continue
        if pages != "*fp32":
            entries = 2 * constants["TILE"] * (2 if pages == "*bf16" else 1)
            cycles = kernel["instructions"] * kernel["warps"] / 4
            assert entries * 128 / cycles >= 1.5 * 20.7, kernel
            found.add(pages)
    assert found == {"*bf16", "*fp8e4nv"}
