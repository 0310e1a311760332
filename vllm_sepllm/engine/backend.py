"""The SEPLLM attention backend: two KV-cache groups per layer, one attention over both.

vLLM gives the attention layer the window group. A second, small layer object
(:class:`KeptLayer`) stands for the kept group: vLLM plans, allocates and binds its pages like
any layer's, and this layer's implementation finds them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from sepllm_kernels.kept_prefill import kept_prefill
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    replace_as,
)

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine import settings
from vllm_sepllm.engine.checks import OTHER_BACKEND
from vllm_sepllm.engine.cpu_attention import CpuPages, PagedCall
from vllm_sepllm.engine.cpu_plan import BatchPlan, StaircaseRow
from vllm_sepllm.engine.metadata import (
    KeptMetadata,
    KeptMetadataBuilder,
    WindowMetadata,
    WindowMetadataBuilder,
)
from vllm_sepllm.engine.registration import BACKEND_NAME
from vllm_sepllm.engine.spec import KeptSpec, WindowSpec

KEPT_SUFFIX = ".kept"


def layer_index(name: str) -> int:
    """Index of the layer an attention module belongs to, counted over all pipeline stages."""
    return int(extract_layer_index(name))


class SepLLMBackend(AttentionBackend):
    """Window group of the backend, and what vLLM selects by name."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = CPUAttentionBackend.supported_dtypes
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enumeration."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SepLLMImpl]:
        """The implementation."""
        return SepLLMImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The builder of this group."""
        return WindowMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Pages are split into what the C++ kernel works in, which keeps staging small."""
        return [32, 16]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes of vLLM's C++ kernel."""
        return CPUAttentionBackend.get_supported_head_sizes()

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each layer's pages in one piece, heads first."""
        return CPUAttentionBackend.supported_kv_cache_layouts()

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        """Refuse other hardware."""
        if current_platform.is_cpu():
            return None
        return "this version of vllm-sepllm runs on CPU only"

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors move pages they take for dense ones."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Full attention in, the window group out; anything else stays what it is."""
        if type(spec) is not FullAttentionSpec:
            return spec
        options = settings.options(get_current_vllm_config())
        dropped = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(spec, WindowSpec, drop=dropped, sliding_window=options.window_size)


class KeptBackend(SepLLMBackend):
    """Kept group of the backend."""

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The builder of this group."""
        return KeptMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec is ours already."""
        return spec


class KeptLayer(torch.nn.Module, AttentionLayerBase):
    """Stands for the kept group of one attention layer."""

    def __init__(self, window_spec: FullAttentionSpec) -> None:
        super().__init__()
        self._window_spec = window_spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend of the kept group."""
        return KeptBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The kept group's spec, with pages like the window group's."""
        options = settings.options(vllm_config)
        spec = self._window_spec
        return KeptSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            window_size=options.window_size,
            num_sink_tokens=options.num_sink_tokens,
            expected_kept_share=settings.expected_kept_share(vllm_config),
        )


@dataclass
class StepWork:
    """What a step's plan turns into, shared by all layers of a group."""

    plan: BatchPlan
    paged: PagedCall | None
    token_index: torch.Tensor | None  # batch index of the paged queries; None: all, in order
    masks: list[dict[int, torch.Tensor]] = field(default_factory=list)


class SepLLMImpl(AttentionImpl):
    """Attention of one layer over its window and its kept stream, on CPU."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise ConfigError(f"ALiBi needs the distance of every key: {OTHER_BACKEND}")
        if kv_sharing_target_layer_name is not None:
            raise ConfigError(
                f"a layer shares the KV cache of {kv_sharing_target_layer_name}, which SepLLM "
                f"attention does not support: {OTHER_BACKEND}"
            )
        assert sliding_window is None, "sliding-window layers are given another backend"
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self._kept_name = ""
        self._pages: CpuPages | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Register the kept layer beside this one, before vLLM collects KV-cache specs."""
        vllm_config = get_current_vllm_config()
        layers = vllm_config.compilation_config.static_forward_context
        name, layer = next(
            (name, layer)
            for name, layer in layers.items()
            if isinstance(layer, Attention) and layer.impl is self
        )
        if layer.head_size_v != layer.head_size:
            raise ConfigError(
                f"{name} has values of size {layer.head_size_v} and keys of size "
                f"{layer.head_size}, SepLLM attention needs both alike: {OTHER_BACKEND}"
            )
        dense = settings.options(vllm_config).dense_layers
        if dense and layer_index(name) in dense:
            self._make_dense(layer, act_dtype)
            return
        self._kept_name = name + KEPT_SUFFIX
        spec = layer.get_kv_cache_spec(vllm_config)
        layers.setdefault(self._kept_name, KeptLayer(spec))

    def _make_dense(self, layer: Attention, act_dtype: torch.dtype) -> None:
        """Give the layer vLLM's own backend; only now is it known which layer it is."""
        layer.attn_backend = CPUAttentionBackend
        layer.backend = AttentionBackendEnum[CPUAttentionBackend.get_name()]
        layer.impl = CPUAttentionBackend.get_impl_cls()(
            self.num_heads,
            self.head_size,
            self.scale,
            self.num_kv_heads,
            None,
            None,
            self.kv_cache_dtype,
            self.logits_soft_cap or None,
            AttentionType.DECODER,
            None,
        )
        layer.impl.process_weights_after_loading(act_dtype)

    def bind_pages(self, kv_cache: torch.Tensor, staging_start: int) -> None:
        """Find this layer's pages in the buffer vLLM has just allocated.

        Args:
            kv_cache: the layer's view of the buffer.
            staging_start: bytes of the buffer that belong to layers; staging pages follow.
        """
        isa = _get_attn_isa(kv_cache.dtype, kv_cache.shape[2], self.head_size, "auto")
        self._pages = CpuPages(kv_cache, staging_start, isa)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: WindowMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values, then attend.

        Args:
            layer: the attention layer.
            query: ``[num_tokens, num_heads, head_size]``.
            key, value: ``[num_tokens, num_kv_heads, head_size]``.
            kv_cache: the layer's pages.
            attn_metadata: the window group's part of the batch; ``None`` when vLLM warms up.
            output: ``[num_tokens, num_heads, head_size]``, written.
            output_scale, output_block_scale: fused output quantization, never given on CPU.
        """
        if attn_metadata is None:
            return output.zero_()
        kept: KeptMetadata = get_forward_context().attn_metadata[self._kept_name]
        pages = self._pages
        assert pages is not None, "SepLLMImpl.bind_pages was not called"
        num_tokens = int(kept.batch.query_start[-1])
        slots = attn_metadata.slot_mapping[:num_tokens]
        pages.write(key[:num_tokens], value[:num_tokens], slots)
        if kept.token_index.numel():
            index = kept.token_index
            pages.write(key[index], value[index], kept.slot_mapping)
        work = self._work(kept, attn_metadata, pages, query.dtype)
        if work.paged is not None:
            self._run_paged(work, pages, query[:num_tokens], output[:num_tokens])
        for row, masks in zip(work.plan.staircase, work.masks, strict=True):
            self._run_staircase(kept, row, masks, pages, query, key, value, output)
        return output

    def _work(
        self, kept: KeptMetadata, window: WindowMetadata, pages: CpuPages, dtype: torch.dtype
    ) -> StepWork:
        """The step's work, made by the first layer that asks."""
        cache = kept.work
        key = (id(window), self.num_heads)
        if key not in cache:
            plan = kept.plan(window, pages.block_size)
            paged, token_index = None, None
            if plan.paged is not None:
                batch, rows = plan.batch, plan.paged
                sizes = self.num_heads, self.num_kv_heads, self.head_size
                paged = PagedCall(rows, *sizes, dtype, pages.isa)
                if plan.staircase:
                    starts = batch.query_start.tolist()
                    spans = [torch.arange(starts[i], starts[i + 1]) for i in rows.requests]
                    token_index = torch.cat(spans)
            cache[key] = StepWork(plan, paged, token_index, [{} for _ in plan.staircase])
        return cache[key]

    def _run_paged(
        self, work: StepWork, pages: CpuPages, query: torch.Tensor, output: torch.Tensor
    ) -> None:
        assert work.paged is not None
        if work.token_index is None:
            work.paged.run(pages, query, output, self.scale, self.logits_soft_cap)
            return
        part = query[work.token_index]
        result = torch.empty_like(part)
        work.paged.run(pages, part, result, self.scale, self.logits_soft_cap)
        output[work.token_index] = result

    def _run_staircase(
        self,
        kept: KeptMetadata,
        row: StaircaseRow,
        masks: dict[int, torch.Tensor],
        pages: CpuPages,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        first, stop = (int(x) for x in kept.batch.query_start[row.request : row.request + 2])
        stream_key, stream_value = pages.read_pages(torch.from_numpy(row.stream_pages))
        window_key, window_value = pages.read_pages(torch.from_numpy(row.window_pages))
        before = slice(row.window_first, row.window_first + row.window_length)

        def with_chunk(window: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
            return torch.cat([window[:, before], chunk[first:stop].transpose(0, 1)], dim=1)

        output[first:stop] = kept_prefill(
            query[first:stop],
            stream_key,
            stream_value,
            with_chunk(window_key, key),
            with_chunk(window_value, value),
            torch.from_numpy(row.stream_limits),
            kept.policy.window_size,
            self.scale,
            self.logits_soft_cap,
            masks,
        )
