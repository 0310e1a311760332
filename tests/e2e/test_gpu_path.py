"""The GPU backend with both model runners, its kernels in Triton's interpreter.

The tests themselves are in ``tests/interpreted``: what they need is chosen before vLLM is imported.
"""

import pytest
from rerun import LIMIT, rerun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(LIMIT + 60)]

TESTS = "interpreted/test_gpu_path.py"


def test_v1_runner():
    names = "preemption or (captured and options1) or (cache_positions and 5)"
    rerun(3, TESTS, names, SEPLLM_TEST_GPU_PATH="1")


def test_v1_runner_asynchronous():
    """Token ids on the host are -1 then, and several groups ask for the counts of one step."""
    rerun(1, TESTS, "groups", SEPLLM_TEST_GPU_PATH="1", SEPLLM_TEST_ASYNC_SCHEDULING="1")


def test_v2_runner():
    """All but what the V1 runner shows as well."""
    rerun(
        16,
        TESTS,
        "not (cache_positions and 5) and not (captured and options1)",
        SEPLLM_TEST_GPU_PATH="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
    )


def test_v2_runner_asynchronous():
    """Steps are scheduled before the tokens of the one before are known, as on CUDA by default."""
    rerun(
        2,
        TESTS,
        "preemption or test_drafts",
        SEPLLM_TEST_GPU_PATH="1",
        VLLM_USE_V2_MODEL_RUNNER="1",
        SEPLLM_TEST_ASYNC_SCHEDULING="1",
    )
