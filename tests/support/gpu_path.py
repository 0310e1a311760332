"""The GPU backend in an engine on a CPU, its Triton kernels in the interpreter. For tests only.

Everything but the device is what runs on CUDA: backend, builders, rows on the device, kernels.
"""

from __future__ import annotations

from dataclasses import replace

from sepllm_kernels.paged.decode import triton as decode
from sepllm_kernels.paged.launches import Launch
from sepllm_kernels.paged.prefill import triton as prefill
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.config import PREFILL_KERNELS
from vllm_sepllm.engine.cpu import backend as cpu_backend
from vllm_sepllm.engine.cpu import platform
from vllm_sepllm.engine.gpu.backend import HEAD_SIZES, SepLLMGPUBackend
from vllm_sepllm.engine.gpu.worker import DeviceTokenWorker
from vllm_sepllm.engine.names import BACKEND_PATH


class InterpretedWorker(DeviceTokenWorker, CPUWorker):
    """Takes the place of :class:`vllm_sepllm.engine.gpu.worker.SepLLMGPUWorker`."""


def select_gpu_path() -> None:
    """Have engines of this process run the GPU backend."""
    # An operation on a tile takes the interpreter about as long whatever its size.
    decode.tile_entries = prefill.tile_entries = lambda head_size, element_size: 512
    prefill.LAUNCHES = (Launch(512, 1, 1),)
    decode.PROGRAMS = 2
    platform.CPU_BACKEND_PATH = BACKEND_PATH
    cpu_backend.SepLLMCPUBackend = SepLLMGPUBackend
    cpu = platform._cpu
    platform._cpu = lambda: replace(
        cpu(),
        worker_path="gpu_path.InterpretedWorker",
        head_sizes=HEAD_SIZES,
        quantized_cache_dtypes=("fp8",),
        prefill_kernels=PREFILL_KERNELS,
        blocks_are_powers=True,
    )
