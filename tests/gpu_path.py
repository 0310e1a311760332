"""The GPU backend in an engine on a CPU, its Triton kernels in the interpreter. For tests only.

Everything but the device is what runs on CUDA: backend, builders, rows on the device, kernels.
"""

from __future__ import annotations

from sepllm_kernels.kept_decode import triton as decode
from sepllm_kernels.kept_prefill import triton as prefill
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.config import PREFILL_KERNELS
from vllm_sepllm.engine import platform
from vllm_sepllm.engine.gpu_worker import DeviceTokenWorker
from vllm_sepllm.engine.registration import BACKEND_PATH


class InterpretedWorker(DeviceTokenWorker, CPUWorker):
    """Takes the place of :class:`vllm_sepllm.engine.gpu_worker.SepLLMGPUWorker`."""


def select_gpu_path() -> None:
    """Have engines of this process run the GPU backend."""
    # An operation on a tile takes the interpreter about as long whatever its size.
    decode.tile_entries = prefill.tile_entries = lambda head_size, element_size: 512
    prefill.ROWS = 512
    decode.PROGRAMS = 2
    platform.CPU_BACKEND_PATH = BACKEND_PATH
    platform.CPU_PREFILL_KERNELS = PREFILL_KERNELS
    platform.CPU_WORKER_PATH = "gpu_path.InterpretedWorker"
