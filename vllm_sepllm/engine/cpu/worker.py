"""vLLM's CPU worker, with staging pages behind the KV cache and token ids for the builders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.engine.cpu.counts import HostCounts
from vllm_sepllm.engine.cpu.reserve import memory_for_blocks, staging_bytes
from vllm_sepllm.engine.cpu.seeds import draw_for_answers_only
from vllm_sepllm.engine.worker.worker import SepLLMWorker

logger = init_logger(f"vllm.{__name__}")


class SepLLMCPUWorker(SepLLMWorker, CPUWorker):
    """Set as ``worker_cls`` at start-up when the SEPLLM backend is selected on CPU."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; the V1 runner then computes requests with a seed."""
        super().load_model(*args, **kwargs)
        if not self.use_v2_model_runner:
            draw_for_answers_only(self.model_runner)

    def replace_model_state(self) -> None:
        """Have the V2 runner's builders find token ids."""
        from vllm_sepllm.engine.cpu.model_state import SepLLMCPUModelState

        SepLLMCPUModelState.replace(self.model_runner)

    def make_counts(self) -> HostCounts:
        """Counts of whole requests, for the V1 runner."""
        return HostCounts.of(self.vllm_config)

    def determine_available_memory(self) -> int:
        """vLLM's figure less the staging pages, so that the total stays what was asked for."""
        available = super().determine_available_memory()
        blocks = memory_for_blocks(self.vllm_config, self.get_kv_cache_spec(), available)
        logger.debug(
            "SepLLM attention: %.1f of %.1f MiB of the KV cache are staging pages",
            (available - blocks) / 2**20,
            available / 2**20,
        )
        return blocks

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache with staging pages behind it, and connect what needs it."""
        specs = self.get_kv_cache_spec()
        extra = staging_bytes(self.vllm_config, specs, kv_cache_config.num_blocks)
        layers_end = kv_cache_config.kv_cache_tensors[0].size
        tensors = [
            replace(tensor, size=tensor.size + extra) for tensor in kv_cache_config.kv_cache_tensors
        ]
        super().initialize_from_config(replace(kv_cache_config, kv_cache_tensors=tensors))
        for layer in self.sepllm_layers().values():
            layer.impl.bind_pages(layer.kv_cache, layers_end)
