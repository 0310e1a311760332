"""vLLM's CPU platform, with configurations that select SepLLM checked and completed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from vllm_sepllm.engine.names import BACKEND_NAME
from vllm_sepllm.engine.startup.platform import complete, is_served

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

    from vllm_sepllm.engine.startup.checks import Hardware

logger = init_logger(f"vllm.{__name__}")

CPU_BACKEND_PATH = "vllm_sepllm.engine.cpu.backend.SepLLMCPUBackend"
CPU_WORKER_PATH = "vllm_sepllm.engine.cpu.worker.SepLLMCPUWorker"
# Finer pages than vLLM's 128 on CPU: a request holds part of a page at each end of its window
# and at the end of its stream, and 32 tokens are what the C++ kernel works in.
DEFAULT_BLOCK_SIZE = 32


def _cpu() -> Hardware:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from vllm_sepllm.engine.startup.checks import Hardware

    return Hardware(
        name="CPU",
        worker_path=CPU_WORKER_PATH,
        head_sizes=tuple(CPUAttentionBackend.get_supported_head_sizes()),
        dense_block_multiple=32,
        stages_need_compilation=True,
    )


class SepLLMCpuPlatform(CpuPlatform):
    """The CPU platform of a process that has this package installed."""

    # The resource vLLM asks Ray for, one per worker; vLLM's own CPU platform names none and refuses
    # Ray. It must be one whose ids Ray hands to workers (`get_accelerator_ids`), and "GPU" is the
    # one that `ray start --num-gpus` sets on any machine: here a "GPU" of Ray stands for a worker.
    # Ray workers read it before they load general plugins, so it cannot depend on the backend;
    # `_keep_refusal_of_ray` is why it changes nothing for others.
    ray_device_key = "GPU"
    _has_kernels = False

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check and complete a configuration that selects SepLLM.

        Raises:
            ConfigError: it cannot be served; the message says why and what to do.
        """
        if not is_served(vllm_config):
            _keep_refusal_of_ray(vllm_config.parallel_config)
            super().check_and_update_config(vllm_config)
            return

        def complete_own() -> None:
            asked = vllm_config.cache_config.kv_cache_memory_bytes
            super(SepLLMCpuPlatform, cls).check_and_update_config(vllm_config)
            _say_which_memory_counts(asked, vllm_config.cache_config.kv_cache_memory_bytes)
            if not vllm_config.cache_config.user_specified_block_size:
                vllm_config.cache_config.block_size = DEFAULT_BLOCK_SIZE

        complete(vllm_config, _cpu(), complete_own)
        if vllm_config.parallel_config.use_ray:
            # With too few, vLLM waits half an hour and speaks of GPUs, on a CPU machine.
            logger.info_once(
                "Ray on CPU: each of the %d workers takes one logical GPU of the cluster, and "
                "the start waits until it has that many (ray start --num-gpus)",
                vllm_config.parallel_config.world_size,
            )

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: VllmConfig) -> None:
        """vLLM's own, with our default where the user gave none.

        vLLM 0.32 sets its default of 128 above, 0.33 here, once the model is loaded.
        """
        from vllm_sepllm.engine.startup import settings

        super().update_block_size_for_backend(vllm_config)
        cache_config = vllm_config.cache_config
        is_ours = vllm_config.model_config is not None and settings.is_selected(vllm_config)
        if is_ours and not cache_config.user_specified_block_size:
            cache_config.block_size = DEFAULT_BLOCK_SIZE

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """vLLM's own, kept away from llvmlite.

        It looks into every attribute of every loaded module. One object of llvmlite, which
        numba loads, answers to any attribute name and ends that scan with an error, so a
        process could not start a second engine. Not needed once vLLM's scan skips it.

        Once for a process: a second engine would replace the replacements, and the scan is most
        of the time that its start takes.
        """
        if SepLLMCpuPlatform._has_kernels:
            return
        hidden = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "llvmlite"}
        for name in hidden:
            del sys.modules[name]
        try:
            super().register_triton_kernel_overrides()
            SepLLMCpuPlatform._has_kernels = True
        finally:
            sys.modules.update(hidden)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """The backend of one layer: ours for full attention, vLLM's for sliding windows.

        Raises:
            ValueError: the layer is of a kind SepLLM does not serve.
        """
        if selected_backend is None or selected_backend.name != BACKEND_NAME:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.has_sliding_window:
            return super().get_attn_backend_cls(None, attn_selector_config, num_heads)
        from vllm_sepllm.engine.cpu.backend import SepLLMCPUBackend

        reasons = SepLLMCPUBackend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"SepLLM attention cannot serve this model: {', '.join(reasons)}; "
                "use another attention backend"
            )
        return CPU_BACKEND_PATH


def _say_which_memory_counts(asked: int | None, given: int | None) -> None:
    """Warn if vLLM replaced a size of the KV cache, bytes, by that in the environment, GiB."""
    name = "VLLM_CPU_KVCACHE_SPACE"
    if asked is None or asked == given or name not in os.environ:
        return
    logger.warning_once(
        "%s=%s in the environment counts (%d bytes of KV cache), and kv_cache_memory_bytes=%d "
        "does not: unset one of the two",
        name,
        os.environ[name],
        given,
        asked,
    )


def _keep_refusal_of_ray(parallel_config: ParallelConfig) -> None:
    """End the start of another backend on Ray, in the words of vLLM's own CPU platform.

    vLLM says them once it has reached Ray. There it would now find a ``ray_device_key`` and wait
    half an hour for GPUs, which the Ray of a CPU machine does not have.

    Raises:
        ValueError: the configuration needs Ray.
    """
    ray_ranks = parallel_config.data_parallel_size > 1 and (
        parallel_config.data_parallel_backend == "ray"
    )
    if parallel_config.use_ray or ray_ranks:
        raise ValueError(f"current platform {CpuPlatform.device_name} does not support ray.")
