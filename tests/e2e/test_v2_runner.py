"""vLLM's V2 model runner, the default on CUDA, counts kept tokens on a CPU too.

On a CPU its Triton kernels run in the interpreter, so this is one test; CONTRIBUTING says how to
run others. With the CUDA backend it runs drafts and asynchronous steps as well: test_gpu_path.py.
"""

import pytest
from rerun import LIMIT, rerun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(LIMIT + 60)]


def test_preemption_and_aborts():
    names = "aborts_in_every"
    rerun(1, "e2e/test_request_interruptions.py", names, VLLM_USE_V2_MODEL_RUNNER="1")
