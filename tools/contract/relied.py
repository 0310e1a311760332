"""What the engine relies on in vLLM that its code does not show by itself."""

from __future__ import annotations

# Members of objects whose class no annotation tells, and those named by a string.
MEMBERS: dict[str, tuple[str, ...]] = {
    "vllm.config.parallel:ParallelConfig": (
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ),
    "vllm.engine.arg_utils:EngineArgs": ("model", "dtype", "attention_backend"),
    "vllm.entrypoints.llm:LLM": ("get_tokenizer", "llm_engine"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": ("base_layer",),
    "vllm.model_executor.layers.attention:Attention": ("impl", "kv_cache"),
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": ("bind_kv_cache",),
    "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase": (
        "_compute_inv_freq",
        "_forward_method",
        "base",
        "cos_sin_cache",
    ),
    "vllm.model_executor.layers.rotary_embedding.linear_scaling_rope:"
    "LinearScalingRotaryEmbedding": ("scaling_factors",),
    "vllm.model_executor.layers.rotary_embedding:YaRNScalingRotaryEmbedding": (
        "mscale",
        "scaling_factor",
    ),
    "vllm.outputs:CompletionOutput": ("finish_reason", "stop_reason"),
    "vllm.outputs:RequestOutput": ("outputs",),
    "vllm.v1.attention.selector:AttentionSelectorConfig": ("has_sliding_window",),
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": ("single_type_managers",),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": ("coordinator",),
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": ("block_id", "is_null", "ref_cnt"),
    "vllm.v1.core.sched.scheduler:Scheduler": ("kv_cache_manager",),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": ("req_to_blocks",),
    "vllm.v1.engine.core:EngineCore": ("scheduler",),
    "vllm.v1.engine.core_client:InprocClient": ("engine_core",),
    "vllm.v1.engine.llm_engine:LLMEngine": (
        "add_request",
        "engine_core",
        "has_unfinished_requests",
    ),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": (  # dropped by SepLLMBackend.customize_spec
        "attention_chunk_size",
        "non_causal",
        "sliding_window",
    ),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": ("page_size_bytes",),
    "vllm.v1.metrics.loggers:StatLoggerManager": ("engine_indexes", "stat_loggers"),
    "vllm.v1.utils:CpuGpuBuffer": ("gpu",),
    "vllm.v1.worker.gpu_input_batch:InputBatch": ("req_ids",),
    "vllm.v1.worker.utils:AttentionGroup": ("metadata_builders",),
}

# Other names that must exist, and constants that must have a value.
NAMES: tuple[str, ...] = (
    "vllm.v1.attention.selector:AttentionSelectorConfig",
    "vllm.v1.engine.core:get_kv_cache_configs",
)
# Attributes that a function of vLLM's (among `ASSUMED`) sets on its objects, which no class shows.
SET_FROM_OUTSIDE: tuple[str, ...] = ("_k_scale_float", "_v_scale_float")
VALUES: dict[str, str] = {
    "vllm.plugins:DEFAULT_PLUGINS_GROUP": "vllm.general_plugins",
    "vllm.plugins:PLATFORM_PLUGINS_GROUP": "vllm.platform_plugins",
}

# Objects all of whose fields are passed on as keywords: class, function, keywords beside them.
SPREADS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "vllm.v1.attention.selector:AttentionSelectorConfig",
        "vllm.v1.attention.backend:AttentionBackend.validate_configuration",
        ("device_capability",),
    ),
)

# Code whose behaviour the engine builds on without calling it. It may go elsewhere; that it
# changed is shown, because somebody has to read it then.
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
ASSUMED: tuple[str, ...] = (
    f"{_MANAGER}.free",
    f"{_MANAGER}.new_step_starts",
    f"{_MANAGER}.remove_skipped_blocks",
    f"{_RUNNER}._build_attention_metadata",
    f"{_RUNNER}._prepare_input_ids",
    f"{_RUNNER}._update_states",
    f"{_RUNNER}.get_kv_cache_spec",
    f"{_RUNNER}.initialize_kv_cache",
    "vllm.config.model:ModelConfig.supports_kv_cache_grouping",
    "vllm.model_executor.layers.attention:Attention.forward",
    "vllm.model_executor.layers.attention.attention:set_default_quant_scales",
    "vllm.platforms.cpu:CpuPlatform.update_block_size_for_backend",
    "vllm.v1.core.block_pool:BlockPool.free_blocks",
    "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.cache_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.free",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
    "vllm.v1.core.sched.scheduler:Scheduler._free_blocks",
    "vllm.v1.core.sched.scheduler:Scheduler._make_cached_request_data",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session",
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_with_output",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
    "vllm.v1.metrics.loggers:StatLoggerManager.record",
    "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model",
)
