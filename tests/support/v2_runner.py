"""vLLM's V2 model runner, the default on CUDA, on a CPU. For tests only.

It needs Triton, which has no CPU backend: its kernels run in Triton's interpreter. To be called
before vLLM is imported.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


def interpret_vllms_kernels() -> None:
    """Have vLLM find Triton, whose interpreter then runs its kernels.

    What would be compiled runs as it is: there is no compiler behind it.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def select_v2_runner() -> None:
    """Have engines of this process use the V2 runner."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    interpret_vllms_kernels()


def schedule_asynchronously() -> None:
    """Have the CPU platform leave asynchronous scheduling on, as it is on CUDA by default.

    vLLM switches it off on CPU, where it gains nothing.
    """
    from vllm.platforms.cpu import CpuPlatform

    switch_off = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        switch_off(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
