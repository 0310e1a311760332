"""vLLM's CUDA platform, with configurations that select SepLLM checked and completed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms.cuda import CudaPlatform

from vllm_sepllm.engine.compat import CUDA_CAUTION
from vllm_sepllm.engine.names import BACKEND_NAME
from vllm_sepllm.engine.startup.platform import complete, is_served

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sepllm.engine.startup.checks import Hardware

logger = init_logger(f"vllm.{__name__}")

GPU_WORKER_PATH = "vllm_sepllm.engine.gpu.worker.SepLLMGPUWorker"


def _gpu() -> Hardware:
    from vllm_sepllm.config import PREFILL_KERNELS
    from vllm_sepllm.engine.gpu.backend import HEAD_SIZES
    from vllm_sepllm.engine.startup.checks import Hardware

    return Hardware(
        name="CUDA",
        worker_path=GPU_WORKER_PATH,
        head_sizes=HEAD_SIZES,
        quantized_cache_dtypes=("fp8", "fp8_e4m3"),
        prefill_kernels=PREFILL_KERNELS,
        blocks_are_powers=True,
    )


class SepLLMCudaPlatform(CudaPlatform):
    """The CUDA platform of a process that has this package installed."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check and complete a configuration that selects SepLLM.

        Raises:
            ConfigError: it cannot be served; the message says why and what to do.
        """
        if not is_served(vllm_config):
            super().check_and_update_config(vllm_config)
            return

        def complete_own() -> None:
            super(SepLLMCudaPlatform, cls).check_and_update_config(vllm_config)

        complete(vllm_config, _gpu(), complete_own)
        logger.warning_once("SepLLM attention on CUDA was %s.", CUDA_CAUTION)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """The backend of one layer: ours for full attention, vLLM's choice for sliding windows.

        Raises:
            ValueError: the layer is of a kind SepLLM does not serve.
        """
        is_ours = selected_backend is not None and selected_backend.name == BACKEND_NAME
        if is_ours and attn_selector_config.has_sliding_window:
            selected_backend = None
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
