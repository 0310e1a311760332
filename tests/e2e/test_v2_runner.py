"""vLLM's V2 model runner, the default on CUDA, passes tests of this suite too.

On a CPU its Triton kernels run in the interpreter, so these are a few; CONTRIBUTING says how to run
others. With the CUDA backend it runs more of them: test_gpu_path.py.
"""

import pytest
from rerun import LIMIT, rerun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(LIMIT + 60)]

SYNCHRONOUS = {
    "preemption and aborts": (
        4,
        "test_request_interruptions.py",
        "aborts_in_every or overtake or least_urgent or reset",
    ),
    "drafts": (1, "test_speculation.py", "64-32"),
}
ASYNCHRONOUS = {
    "random traffic": (1, "test_soak.py", "301"),
}


def run(count, file, names, **environment):
    rerun(count, f"e2e/{file}", names, VLLM_USE_V2_MODEL_RUNNER="1", **environment)


@pytest.mark.parametrize("kind", SYNCHRONOUS)
def test_synchronous(kind):
    run(*SYNCHRONOUS[kind])


@pytest.mark.parametrize("kind", ASYNCHRONOUS)
def test_asynchronous(kind):
    """Steps are scheduled before the tokens of the one before are known."""
    run(*ASYNCHRONOUS[kind], SEPLLM_TEST_ASYNC_SCHEDULING="1")
