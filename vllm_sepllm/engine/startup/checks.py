"""What SepLLM attention does not serve, found before a model is loaded.

Every refusal is one sentence: value, limit, remedy. Nothing falls back to dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from vllm.config import CompilationMode, ModelConfig, VllmConfig
from vllm.config.model import _get_and_verify_max_len

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.engine.compat import groups_own_kv_cache
from vllm_sepllm.engine.names import ASYNC_SCHEDULER_PATH, SCHEDULER_PATH
from vllm_sepllm.engine.startup.settings import OPTIONS_KEY

OTHER_BACKEND = "use another attention backend"
BLOCK_MULTIPLE = 16
MAX_STREAM_TOKENS = 2**23  # what a text may have in cache positions


@dataclass(frozen=True)
class Hardware:
    """What the backend of one kind of hardware can serve.

    Attributes:
        name: of the hardware.
        worker_path: the worker class that runs it.
        head_sizes: of keys and values, elements.
        quantized_cache_dtypes: ``kv_cache_dtype`` beside the model's own type.
        prefill_kernels: choices of the option of that name.
        dense_block_multiple: of the block size with layers that keep full attention.
        blocks_are_powers: block sizes must be powers of two.
        stages_need_compilation: vLLM runs pipeline stages on it only with compilation.
    """

    name: str
    worker_path: str
    head_sizes: tuple[int, ...]
    quantized_cache_dtypes: tuple[str, ...] = ()
    prefill_kernels: tuple[str, ...] = ("triton",)
    dense_block_multiple: int = BLOCK_MULTIPLE
    blocks_are_powers: bool = False
    stages_need_compilation: bool = False


def refusals(vllm_config: VllmConfig, options: SepLLMConfig, hardware: Hardware) -> list[str]:
    """Everything that stands against serving this configuration; empty if nothing does."""
    return [
        *_option_refusals(options, hardware),
        *_misplaced_options(vllm_config.additional_config),
        *_model_refusals(vllm_config, hardware),
        *_length_refusals(vllm_config.model_config, options),
        *_cache_refusals(vllm_config, options, hardware),
        *_parallel_refusals(vllm_config, hardware),
        *_runner_refusals(vllm_config, hardware),
    ]


def _option_refusals(options: SepLLMConfig, hardware: Hardware) -> Iterator[str]:
    if options.position_mode == "cache" and options.dense_layers:
        yield (
            f"dense_layers={list(options.dense_layers)} with position_mode='cache': layers with "
            "full attention have no cache positions; drop one of the two"
        )
    kernel = options.prefill_kernel
    if kernel not in hardware.prefill_kernels:
        yield f"prefill_kernel={kernel!r} is not for {hardware.name}: leave it out"
    elif kernel == "xformers" and find_spec("xformers") is None:
        yield (
            "prefill_kernel='xformers' and xformers is not installed: "
            "pip install 'vllm-sepllm[xformers]', or leave it out"
        )


def _misplaced_options(additional: Any) -> Iterator[str]:
    """Keys beside "sepllm" that were surely meant for it; other plugins' keys are left alone."""
    names = {field.name for field in fields(SepLLMConfig)}
    for key in additional if isinstance(additional, dict) else ():
        right = key == OPTIONS_KEY or not isinstance(key, str)
        if not right and (key in names or key.strip().casefold() == OPTIONS_KEY):
            where = f'{{"{OPTIONS_KEY}": {{"window_size": 64}}}}'
            yield f"additional_config has the key {key!r}: options belong under {where}"


def _model_refusals(vllm_config: VllmConfig, hardware: Hardware) -> Iterator[str]:
    model: Any = vllm_config.model_config
    name = model.model
    if model.use_mla:
        yield f"{name} uses multi-head latent attention, whose cache is not per head: " + (
            OTHER_BACKEND
        )
    if model.is_encoder_decoder:
        yield f"{name} is an encoder-decoder model, only decoders are served: {OTHER_BACKEND}"
    elif model.attn_type != "decoder":
        yield (
            f"{name} has attention of type {model.attn_type!r}, only 'decoder' is served: "
            f"{OTHER_BACKEND}"
        )
    sizes = hardware.head_sizes
    if not model.use_mla and model.get_head_size() not in sizes:
        yield (
            f"{name} has heads of size {model.get_head_size()}, must be one of "
            f"{', '.join(map(str, sizes))}: {OTHER_BACKEND}"
        )
    if model.runner_type == "pooling":
        yield f"{name} is run for pooling, only text generation is served: {OTHER_BACKEND}"
    if model.uses_alibi:
        yield f"{name} uses ALiBi, which needs the distance of every key: {OTHER_BACKEND}"
    if model.is_mm_prefix_lm:
        yield f"{name} attends to its prefix in both directions: {OTHER_BACKEND}"
    if groups_own_kv_cache(model):
        yield f"{name} groups its layers' KV caches in its own way: {OTHER_BACKEND}"
    if model.attention_chunk_size is not None or model.rswa_window is not None:
        yield f"{name} uses chunked or reference-window attention of its own: {OTHER_BACKEND}"
    if model.enable_prompt_embeds:
        yield (
            "enable_prompt_embeds=True gives prompts without token ids, separators cannot be "
            "told: switch it off"
        )
    if vllm_config.cache_config.sliding_window is not None:  # set if every layer slides
        yield (
            f"every layer of {name} uses sliding-window attention (window "
            f"{model.get_sliding_window()}), so there is no full-attention layer to serve: "
            f"{OTHER_BACKEND}"
        )


def trained_length(model_config: ModelConfig) -> int:
    """Tokens a model is made for, whatever ``max_model_len`` was asked for."""
    return _get_and_verify_max_len(
        hf_config=model_config.hf_text_config,
        model_arch_config=model_config.model_arch_config,
        tokenizer_config=None,
        max_model_len=None,
        disable_sliding_window=False,
        sliding_window=None,
    )


def largest_cache(options: SepLLMConfig) -> int | None:
    """Most tokens a query sees, which is where cache positions end; ``None`` if it grows."""
    cache = options.num_sink_tokens + options.window_size
    if options.keeps_nothing:
        return cache
    bound = options.max_separator_tokens
    return None if bound is None else cache + bound


def _length_refusals(model_config: ModelConfig, options: SepLLMConfig) -> Iterator[str]:
    length = model_config.max_model_len
    if options.position_mode != "cache":
        return
    if length > MAX_STREAM_TOKENS:
        yield f"max_model_len={length}: must be at most {MAX_STREAM_TOKENS}; cut the text in two"
    trained, cache = trained_length(model_config), largest_cache(options)
    summed = "num_sink_tokens + max_separator_tokens + window_size"
    if cache is None:  # it grows, from these on
        cache = options.num_sink_tokens + options.window_size
        summed = "num_sink_tokens + window_size"
    if length > trained and cache > trained:
        yield (
            f"{summed} is {cache}: the cache must fit "
            f"into the {trained} positions of {model_config.model}; lower one of them"
        )


def _cache_refusals(
    vllm_config: VllmConfig, options: SepLLMConfig, hardware: Hardware
) -> Iterator[str]:
    cache = vllm_config.cache_config
    dtype = vllm_config.model_config.dtype
    as_is = cache.cache_dtype == "auto" or getattr(torch, cache.cache_dtype, None) == dtype
    if not as_is and cache.cache_dtype not in hardware.quantized_cache_dtypes:
        yield (
            f"kv_cache_dtype={cache.cache_dtype!r} is not supported on {hardware.name} with "
            f"dtype={dtype}: leave it at 'auto'"
        )
    if vllm_config.weight_transfer_config is not None and cache.cache_dtype.startswith("fp8"):
        yield (
            f"weight_transfer_config with kv_cache_dtype={cache.cache_dtype!r}: a captured graph "
            "keeps the scales of the first weights; leave out one of the two"
        )
    if cache.user_specified_block_size:
        rule = _block_size_rule(cache.block_size, bool(options.dense_layers), hardware)
        if rule:
            yield f"block_size={cache.block_size}: must be {rule}, e.g. 32"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            "disable_hybrid_kv_cache_manager=True merges the two KV-cache groups SepLLM needs: "
            "leave it out"
        )
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        yield f"kv_connector={connector!r} moves pages it takes for dense ones: leave it out"
    if vllm_config.ec_transfer_config is not None:
        connector = vllm_config.ec_transfer_config.ec_connector
        yield f"ec_connector={connector!r} is not supported under SEPLLM: leave it out"
    events = vllm_config.kv_events_config
    if events is not None and events.enable_kv_cache_events:
        yield (
            "enable_kv_cache_events=True reports pages by the tokens they hold, which pages of "
            "kept tokens do not have: switch it off"
        )
    if cache.kv_offloading_size is not None:
        yield (
            f"kv_offloading_size={cache.kv_offloading_size} moves pages it takes for dense ones: "
            "leave it out"
        )


def _block_size_rule(block_size: int, has_dense_layers: bool, hardware: Hardware) -> str | None:
    """The rule it breaks, if it does."""
    multiple = hardware.dense_block_multiple if has_dense_layers else BLOCK_MULTIPLE
    if block_size % multiple:
        return f"a multiple of {multiple}" + (" with dense_layers" if has_dense_layers else "")
    if hardware.blocks_are_powers and block_size & (block_size - 1):
        return f"a power of two on {hardware.name}"
    return None


def _parallel_refusals(vllm_config: VllmConfig, hardware: Hardware) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name)
        if size > 1:
            yield f"{name}={size} splits a request's pages over ranks: must be 1"
    stages = parallel.pipeline_parallel_size
    compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
    without = not compiled or vllm_config.lora_config is not None
    if stages > 1 and without and hardware.stages_need_compilation:
        # With any attention: buffers between stages are only made by the warm-up for compilation,
        # and the first request ends the engine with an AssertionError.
        yield (
            f"pipeline_parallel_size={stages} without compilation fails in vLLM on CPU: leave out "
            "enforce_eager and LoRA, which switch it off, or use tensor_parallel_size"
        )
    if stages > 1 and vllm_config.speculative_config is not None:
        # With any attention: a stage is sent drafts before the token in front of them is known, and
        # answers are wrong without a word (vLLM issue 52071).
        yield (
            f"pipeline_parallel_size={stages} with speculative decoding gives wrong tokens in "
            "vLLM: leave out speculative_config, or use tensor_parallel_size"
        )
    if parallel.use_ubatching:
        how = "enable_dbo=True" if parallel.enable_dbo else f"ubatch_size={parallel.ubatch_size}"
        yield f"{how} splits batches, which is not supported: leave it out"
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        yield (
            f"speculative decoding with method={speculative.method!r} is not supported yet: "
            "use 'ngram' or leave speculative_config out"
        )


def _runner_refusals(vllm_config: VllmConfig, hardware: Hardware) -> Iterator[str]:
    worker = vllm_config.parallel_config.worker_cls
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if worker not in ("auto", hardware.worker_path):
        yield f"worker_cls={worker!r}: SepLLM needs a worker of its own; leave it out"
    if scheduler not in (None, SCHEDULER_PATH, ASYNC_SCHEDULER_PATH):
        yield f"scheduler_cls={scheduler!r}: SepLLM needs a scheduler of its own; leave it out"
