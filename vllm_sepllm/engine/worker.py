"""vLLM's CPU worker, with staging pages behind the KV cache and token ids for the builders."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine import settings
from vllm_sepllm.engine.backend import KEPT_SUFFIX, SepLLMBackend, SepLLMImpl, layer_index
from vllm_sepllm.engine.cpu_plan import staging_pages_per_request
from vllm_sepllm.engine.kept_rows import KeptRows, RunnerTokens
from vllm_sepllm.engine.metadata import KeptMetadataBuilder
from vllm_sepllm.engine.spec import WindowSpec

logger = init_logger(f"vllm.{__name__}")


class SepLLMCPUWorker(CPUWorker):
    """Set as ``worker_cls`` at start-up when the SEPLLM backend is selected."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; the V2 runner then keeps our state beside it.

        Raises:
            ConfigError: the model needs a state of its own.
        """
        super().load_model(*args, **kwargs)
        if self.use_v2_model_runner:
            from vllm_sepllm.engine.model_state import SepLLMModelState

            SepLLMModelState.replace(self.model_runner)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """vLLM's specs.

        Raises:
            ConfigError: no layer of the model uses SepLLM attention.
        """
        with set_current_vllm_config(self.vllm_config):  # read by SepLLMBackend.customize_spec
            specs = super().get_kv_cache_spec()
        self._check_dense_layers()
        whole_model = self.parallel_config.pipeline_parallel_size == 1
        if specs and whole_model and not _window_specs(specs):
            raise ConfigError(
                f"no layer of {self.model_config.model} has full attention and is left out of "
                "dense_layers, so SepLLM attention has nothing to do: use another attention backend"
            )
        return specs

    def _check_dense_layers(self) -> None:
        """Layers asked to be dense would have been SepLLM's.

        Raises:
            ConfigError: one has a sliding window of its own.
        """
        dense = settings.options(self.vllm_config).dense_layers
        for name, layer in get_layers_from_vllm_config(self.vllm_config, Attention).items():
            if dense and layer.sliding_window is not None and layer_index(name) in dense:
                raise ConfigError(
                    f"dense_layers holds {layer_index(name)}, a layer with a sliding window of "
                    f"{layer.sliding_window} tokens of its own: leave it out"
                )

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
        window = settings.options(self.vllm_config).window_size
        per_request = page = 0
        for spec in _window_specs(self.get_kv_cache_spec()):
            for size in SepLLMBackend.get_supported_kernel_block_sizes():
                size_bytes = spec.copy_with_new_block_size(size).page_size_bytes
                page = max(page, size_bytes)
                pages = staging_pages_per_request(window, size)
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
        if not self.use_v2_model_runner:
            self._tell_builders_where_tokens_are()
        self._bind_layers(layers_end)

    def _tell_builders_where_tokens_are(self) -> None:
        rows = KeptRows(
            settings.kept_policy(self.vllm_config),
            self.scheduler_config.max_num_seqs,
            self.model_config.max_model_len,
        )
        tokens = RunnerTokens(rows, self.model_runner)
        for groups in self.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    if isinstance(builder, KeptMetadataBuilder):
                        builder.tokens = tokens

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
