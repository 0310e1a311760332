"""What vLLM and Triton must find before they are imported. Importing this module sets it."""

from __future__ import annotations

import os

# Before vLLM or torch is imported anywhere. One thread: these machines are small and shared, and
# threads that spin for each other cost more than they give on models this size.
os.environ.update(
    no_proxy=os.environ.get("no_proxy", "") + ",127.0.0.1,localhost",
    NO_PROXY=os.environ.get("NO_PROXY", "") + ",127.0.0.1,localhost",
    HF_HUB_OFFLINE="1",
    NUMBA_NUM_THREADS="1",  # vLLM's ngram drafts
    OMP_NUM_THREADS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    VLLM_NO_USAGE_STATS="1",
)

import interpreter
import torch
import v2_runner

# Kernels run compiled where there is a GPU, in Triton's interpreter elsewhere.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    interpreter.mend()

# See `tests/e2e/test_gpu_path.py`.
if os.environ.get("SEPLLM_TEST_GPU_PATH") == "1":
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # with Triton, vLLM would choose V2
    v2_runner.interpret_vllms_kernels()
if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    v2_runner.select_v2_runner()
if os.environ.get("SEPLLM_TEST_ASYNC_SCHEDULING") == "1":
    v2_runner.schedule_asynchronously()
if os.environ.get("SEPLLM_TEST_GPU_PATH") == "1":
    import gpu_path

    gpu_path.select_gpu_path()


def inspect_models_here() -> None:
    """vLLM asks a process of its own what each new architecture can do, lest CUDA be initialized in
    this one. On a CPU this only imports vLLM once more, which takes ten seconds."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()
