"""vLLM's CPU worker, with staging pages behind the KV cache and token ids for the builders."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.engine.cpu.backend import SepLLMCPUBackend
from vllm_sepllm.engine.cpu.counts import HostCounts
from vllm_sepllm.engine.cpu.plan import staging_pages_per_request
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.worker import SepLLMWorker, window_specs

logger = init_logger(f"vllm.{__name__}")


class SepLLMCPUWorker(SepLLMWorker, CPUWorker):
    """Set as ``worker_cls`` at start-up when the SEPLLM backend is selected on CPU."""

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
        # Each request that needs staging holds at least the block it writes to, so what the rest
        # of the memory has room for bounds their number too.
        per_request, _ = self._staging_sizes()
        most = available // (per_request + self._block_bytes() + 1) + 1
        staging = self._staging_bytes(most)
        logger.debug(
            "SepLLM attention: %.1f of %.1f MiB of the KV cache are staging pages",
            staging / 2**20,
            available / 2**20,
        )
        return available - staging

    def _staging_bytes(self, num_blocks: int) -> int:
        """Room for the staging pages of one step beside ``num_blocks`` blocks."""
        per_request, page = self._staging_sizes()
        # Pages are counted from a layer's own first one, so staging may begin up to a page late.
        return min(self.scheduler_config.max_num_seqs, num_blocks) * per_request + page

    def _staging_sizes(self) -> tuple[int, int]:
        """Staging bytes of one request, and the bytes of one page.

        Enough whichever size vLLM splits pages into, and for the layer with the largest.
        """
        options, length = Settings.of(self.vllm_config).config, self.model_config.max_model_len
        per_request = page = 0
        for spec in window_specs(self.get_kv_cache_spec()):
            for size in SepLLMCPUBackend.get_supported_kernel_block_sizes():
                size_bytes = spec.copy_with_new_block_size(size).page_size_bytes
                page = max(page, size_bytes)
                pages = staging_pages_per_request(options, size, length)
                per_request = max(per_request, pages * size_bytes)
        return per_request, page

    def _block_bytes(self) -> int:
        """At least the bytes of one block: a page of each layer in the smallest group.

        Groups are made of all stages' layers, of which a stage only knows its own.
        """
        layers = Counter(self.get_kv_cache_spec().values())
        page = min((spec.page_size_bytes for spec in layers), default=0)
        whole_model = self.parallel_config.pipeline_parallel_size == 1
        return page * min(layers.values(), default=0) if whole_model else page

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache with staging pages behind it, and connect what needs it."""
        extra = self._staging_bytes(kv_cache_config.num_blocks)
        layers_end = kv_cache_config.kv_cache_tensors[0].size
        tensors = [
            replace(tensor, size=tensor.size + extra) for tensor in kv_cache_config.kv_cache_tensors
        ]
        super().initialize_from_config(replace(kv_cache_config, kv_cache_tensors=tensors))
        for layer in self.sepllm_layers().values():
            layer.impl.bind_pages(layer.kv_cache, layers_end)
