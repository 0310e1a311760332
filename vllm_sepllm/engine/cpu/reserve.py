"""Memory that staging pages take from the KV cache on a CPU; ``tables.py`` says what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_sepllm.engine.cpu.backend import SepLLMCPUBackend
from vllm_sepllm.engine.cpu.plan import staging_pages_per_request
from vllm_sepllm.engine.scheduling.spec import window_specs
from vllm_sepllm.engine.startup.settings import Settings

Specs = Mapping[str, KVCacheSpec]


def memory_for_blocks(vllm_config: VllmConfig, specs: Specs, available: int) -> int:
    """Bytes that are left for blocks.

    Args:
        vllm_config: resolved.
        specs: of the worker's layers.
        available: bytes of the KV cache, staging pages included.
    """
    # Each request that needs staging holds at least the block it writes to, so what the rest of
    # the memory has room for bounds their number too.
    per_request, _ = _staging_sizes(vllm_config, specs)
    most = available // (per_request + _block_bytes(vllm_config, specs) + 1) + 1
    return available - staging_bytes(vllm_config, specs, most)


def staging_bytes(vllm_config: VllmConfig, specs: Specs, num_blocks: int) -> int:
    """Room for the staging pages of one step beside ``num_blocks`` blocks."""
    per_request, page = _staging_sizes(vllm_config, specs)
    # Pages are counted from a layer's own first one, so staging may begin up to a page late.
    return min(vllm_config.scheduler_config.max_num_seqs, num_blocks) * per_request + page


def _staging_sizes(vllm_config: VllmConfig, specs: Specs) -> tuple[int, int]:
    """Staging bytes of one request, and the bytes of one page.

    Enough whichever size vLLM splits pages into, and for the layer with the largest.
    """
    options = Settings.of(vllm_config).config
    length = vllm_config.model_config.max_model_len
    per_request = page = 0
    for spec in window_specs(specs):
        for size in SepLLMCPUBackend.get_supported_kernel_block_sizes():
            size_bytes = spec.copy_with_new_block_size(size).page_size_bytes
            page = max(page, size_bytes)
            pages = staging_pages_per_request(options, size, length)
            per_request = max(per_request, pages * size_bytes)
    return per_request, page


def _block_bytes(vllm_config: VllmConfig, specs: Specs) -> int:
    """At least the bytes of one block: a page of each layer in the smallest group.

    Groups are made of all stages' layers, of which a stage only knows its own.
    """
    layers = Counter(specs.values())
    page = min((spec.page_size_bytes for spec in layers), default=0)
    whole_model = vllm_config.parallel_config.pipeline_parallel_size == 1
    return page * min(layers.values(), default=0) if whole_model else page
