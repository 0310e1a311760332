"""What fits into a KV cache, before anything is started: ``vllm-sepllm size``.

vLLM's own functions count, from the same KV-cache specs that the engine's layers would have, so
the numbers are those that the engine logs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_capacity,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.compat import kv_cache_configs
from vllm_sepllm.engine.scheduling.spec import KeptSpec, WindowSpec, kept_spec, window_spec
from vllm_sepllm.engine.startup.settings import OPTIONS_KEY, Settings
from vllm_sepllm.engine.worker.backend import SepLLMBackend
from vllm_sepllm.layers import Layer
from vllm_sepllm.planning import Plan

MakeSpecs = Callable[[str, int, FullAttentionSpec], Mapping[str, KVCacheSpec]]


@dataclass(frozen=True)
class Capacity:
    """What a KV cache has room for.

    Attributes:
        num_pages: of the pool, one of which vLLM keeps for itself.
        page_size: tokens of a page.
        pages_per_request: of the full length at most, which is while its prompt is computed.
        pages_decoding: the same while it decodes.
        bytes_decoding: the same in bytes, of all ranks together.
        num_tokens, concurrency: as vLLM logs them: tokens of as many requests as fit at once.
    """

    num_pages: int
    page_size: int
    pages_per_request: int
    pages_decoding: int
    bytes_decoding: int
    num_tokens: int
    concurrency: float


@dataclass(frozen=True)
class Sizes:
    """Capacities of the same memory.

    Attributes:
        length: tokens of a request.
        plan: what share of a text memory is planned for.
        sepllm: under the options.
        full: full attention; ``None`` if not one request fits.
        full_fp8: full attention with a byte per element of the cache; the same.
    """

    length: int
    plan: Plan
    sepllm: Capacity
    full: Capacity | None
    full_fp8: Capacity | None


def sizes(arguments: dict[str, Any], options: dict[str, Any], memory: int) -> Sizes:
    """What ``memory`` has room for.

    Args:
        arguments: of vLLM's ``EngineArgs``, such as ``model`` and ``max_model_len``.
        options: as in ``additional_config["sepllm"]``.
        memory: bytes of the KV cache on each rank, as ``kv_cache_memory_bytes``.

    Raises:
        ValueError: vLLM's start-up refuses it; the message says why.
    """
    known = {field.name for field in fields(EngineArgs)}
    for name in arguments:
        if name not in known:
            raise ConfigError(f"vLLM's EngineArgs have no argument {name!r}: leave it out")
    ours = {"attention_backend": "sepllm", "additional_config": {OPTIONS_KEY: options}}
    config: VllmConfig = _configuration({**arguments, **ours})
    plain: VllmConfig = _configuration({**arguments, "max_model_len": None})
    settings = Settings.of(config)
    model: ModelConfig = config.model_config
    plain.model_config.max_model_len = model.max_model_len  # in cache positions above vLLM's limit
    _check_layers(model)

    def sepllm(name: str, index: int, spec: FullAttentionSpec) -> Mapping[str, KVCacheSpec]:
        if settings.layers[index] is Layer.DENSE:
            return {name: spec}
        return {name: window_spec(spec, settings), f"{name}.kept": kept_spec(spec, settings)}

    def full(name: str, index: int, spec: FullAttentionSpec) -> Mapping[str, KVCacheSpec]:
        return {name: spec}

    def fp8(name: str, index: int, spec: FullAttentionSpec) -> Mapping[str, KVCacheSpec]:
        return {name: replace(spec, dtype=torch.uint8)}

    return Sizes(
        model.max_model_len,
        settings.plan,
        _capacity(config, sepllm, memory, reserves=current_platform.is_cpu()),
        _capacity_if_any(plain, full, memory),
        _capacity_if_any(plain, fp8, memory),
    )


def _configuration(arguments: dict[str, Any]) -> VllmConfig:
    """As ``vllm serve`` makes it."""
    args = EngineArgs(**arguments)
    config: VllmConfig = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    current_platform.update_block_size_for_backend(config)  # the engine does, behind loading
    # Of no consequence where all pages have one size, but vLLM asks for it.
    config.cache_config.kv_cache_layout = _backend().supported_kv_cache_layouts()[0].name
    return config


def _backend() -> type[SepLLMBackend]:
    if current_platform.is_cpu():
        from vllm_sepllm.engine.cpu.backend import SepLLMCPUBackend

        return SepLLMCPUBackend
    from vllm_sepllm.engine.gpu.backend import SepLLMGPUBackend

    return SepLLMGPUBackend


def _check_layers(model: ModelConfig) -> None:
    """Raises:
    ConfigError: the model has layers whose pages are not counted here.
    """
    types = getattr(model.hf_text_config, "layer_types", None) or ()
    kinds = set(types) - {"full_attention", "attention"}
    if (model.is_hybrid or model.has_noops) and not kinds:
        kinds = {"not attention"}
    if kinds:
        raise ConfigError(
            f"{model.model} has layers of other kinds ({', '.join(sorted(kinds))}), whose pages "
            "are not counted here: start the engine, whose log says what fits"
        )


def _capacity_if_any(config: VllmConfig, make_specs: MakeSpecs, memory: int) -> Capacity | None:
    """The same; ``None`` where vLLM would not start, as not one request fits."""
    try:
        return _capacity(config, make_specs, memory)
    except ValueError:
        return None


def _capacity(
    config: VllmConfig, make_specs: MakeSpecs, memory: int, reserves: bool = False
) -> Capacity:
    """Capacity of the layers' specs in ``memory``; staging pages leave less of it on a CPU."""
    stages = _stages(config, make_specs)
    available = [memory] * len(stages)
    if reserves:
        from vllm_sepllm.engine.cpu.reserve import memory_for_blocks

        available = [memory_for_blocks(config, specs, memory) for specs in stages]
    per_stage: list[KVCacheConfig] = kv_cache_configs(config, stages, available)
    found = generate_scheduler_kv_cache_config(per_stage)
    num_tokens, concurrency = get_kv_cache_capacity(config, found)
    length = config.model_config.max_model_len
    pages = sum(_pages_decoding(group.kv_cache_spec, length) for group in found.kv_cache_groups)
    page_bytes = sum(
        max(tensor.size for tensor in each.kv_cache_tensors) // each.num_blocks
        for each in per_stage
    )
    return Capacity(
        num_pages=found.num_blocks,
        page_size=config.cache_config.block_size,
        pages_per_request=round(found.num_blocks / concurrency),
        pages_decoding=pages,
        bytes_decoding=pages * page_bytes * config.parallel_config.tensor_parallel_size,
        num_tokens=num_tokens,
        concurrency=concurrency,
    )


def _pages_decoding(spec: KVCacheSpec, length: int) -> int:
    """Pages of one group of a request whose prompt is computed."""
    if isinstance(spec, KeptSpec):
        return spec.expected_pages(length, 1)
    if isinstance(spec, WindowSpec):
        return spec.max_admission_blocks_per_request(1, length)
    return cdiv(length, spec.block_size)


def _stages(config: VllmConfig, make_specs: MakeSpecs) -> list[dict[str, KVCacheSpec]]:
    """Specs of the layers of each pipeline stage, in the order in which the engine has them."""
    model: ModelConfig = config.model_config
    parallel: ParallelConfig = config.parallel_config
    spec = FullAttentionSpec(
        block_size=config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model),
    )
    num_layers, num_stages = model.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
    stages = []
    for rank in range(num_stages):
        layers = range(*get_pp_indices(num_layers, rank, num_stages))
        made = [make_specs(f"layers.{i}", i, spec) for i in layers]
        # Kept groups' layers come behind all others.
        own = {name: each for specs in made for name, each in list(specs.items())[:1]}
        kept = {name: each for specs in made for name, each in list(specs.items())[1:]}
        stages.append({**own, **kept})
    return stages
