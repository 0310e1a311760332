"""vLLM's CPU worker, with staging pages behind the KV cache and token ids for the builders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine import settings
from vllm_sepllm.engine.backend import KEPT_SUFFIX, SepLLMBackend, SepLLMImpl
from vllm_sepllm.engine.cpu_plan import staging_pages_per_request
from vllm_sepllm.engine.metadata import KeptMetadataBuilder
from vllm_sepllm.engine.spec import WindowSpec

logger = init_logger(f"vllm.{__name__}")


class SepLLMCPUWorker(CPUWorker):
    """Set as ``worker_cls`` at start-up when the SEPLLM backend is selected."""

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """vLLM's specs.

        Raises:
            ConfigError: no layer of the model uses SepLLM attention.
        """
        with set_current_vllm_config(self.vllm_config):  # read by SepLLMBackend.customize_spec
            specs = super().get_kv_cache_spec()
        if specs and not any(isinstance(spec, WindowSpec) for spec in specs.values()):
            raise ConfigError(
                f"no layer of {self.model_config.model} has full attention, so SepLLM attention "
                "has nothing to do: use another attention backend"
            )
        return specs

    def determine_available_memory(self) -> int:
        """vLLM's figure less the staging pages, so that the total stays what was asked for."""
        return super().determine_available_memory() - self._staging_bytes()

    def _staging_bytes(self) -> int:
        """Staging pages of one step, shared by all layers."""
        window = settings.options(self.vllm_config).window_size
        spec = next(s for s in self.get_kv_cache_spec().values() if isinstance(s, WindowSpec))
        sizes = SepLLMBackend.get_supported_kernel_block_sizes()
        block_size = next(size for size in sizes if spec.block_size % size == 0)
        pages = self.scheduler_config.max_num_seqs * staging_pages_per_request(window, block_size)
        return pages * spec.copy_with_new_block_size(block_size).page_size_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache with staging pages behind it, and connect what needs it."""
        extra = self._staging_bytes()
        tensors = [
            replace(tensor, size=tensor.size + extra) for tensor in kv_cache_config.kv_cache_tensors
        ]
        super().initialize_from_config(replace(kv_cache_config, kv_cache_tensors=tensors))
        self._attach_builders()
        self._bind_layers()

    def _attach_builders(self) -> None:
        for groups in self.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    if isinstance(builder, KeptMetadataBuilder):
                        builder.attach(self.model_runner)

    def _bind_layers(self) -> None:
        window = settings.options(self.vllm_config).window_size
        context = self.vllm_config.compilation_config.static_forward_context
        for name, layer in get_layers_from_vllm_config(self.vllm_config, Attention).items():
            if not isinstance(layer.impl, SepLLMImpl):
                continue
            kept = context[name + KEPT_SUFFIX]
            if kept.kv_cache.data_ptr() != layer.kv_cache.data_ptr():
                raise RuntimeError(
                    f"vLLM placed the two KV-cache groups of {name} in different memory: "
                    "this model is not supported by SepLLM attention"
                )
            layer.impl.bind_pages(layer.kv_cache, window, self.scheduler_config.max_num_seqs)
