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
        whole_model = self.parallel_config.pipeline_parallel_size == 1
        if specs and whole_model and not _window_specs(specs):
            raise ConfigError(
                f"no layer of {self.model_config.model} has full attention, so SepLLM attention "
                "has nothing to do: use another attention backend"
            )
        return specs

    def determine_available_memory(self) -> int:
        """vLLM's figure less the staging pages, so that the total stays what was asked for."""
        return super().determine_available_memory() - self._staging_bytes()

    def _staging_bytes(self) -> int:
        """Room for the staging pages of one step, shared by all layers.

        Enough whichever size vLLM splits pages into, and for the layer with the largest: the
        pages of each layer are counted from its own first one, so its first staging page may
        begin up to a page late.
        """
        window = settings.options(self.vllm_config).window_size
        sizes = SepLLMBackend.get_supported_kernel_block_sizes()
        num_reqs = self.scheduler_config.max_num_seqs
        needs = [
            (num_reqs * staging_pages_per_request(window, size) + 1)
            * spec.copy_with_new_block_size(size).page_size_bytes
            for spec in _window_specs(self.get_kv_cache_spec())
            for size in sizes
        ]
        return max(needs, default=0)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache with staging pages behind it, and connect what needs it."""
        extra = self._staging_bytes()
        layers_end = kv_cache_config.kv_cache_tensors[0].size
        tensors = [
            replace(tensor, size=tensor.size + extra) for tensor in kv_cache_config.kv_cache_tensors
        ]
        super().initialize_from_config(replace(kv_cache_config, kv_cache_tensors=tensors))
        self._attach_builders()
        self._bind_layers(layers_end)

    def _attach_builders(self) -> None:
        for groups in self.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    if isinstance(builder, KeptMetadataBuilder):
                        builder.attach(self.model_runner)

    def _bind_layers(self, layers_end: int) -> None:
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
            layer.impl.bind_pages(layer.kv_cache, layers_end)


def _window_specs(specs: dict[str, Any]) -> list[WindowSpec]:
    return [spec for spec in specs.values() if isinstance(spec, WindowSpec)]
