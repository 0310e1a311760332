"""SepLLM attention on CPU: vLLM's C++ paged kernel for decode, torch for chunks of prompts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from sepllm_kernels.sequence.prefill import kept_prefill
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_sepllm.engine.cpu.attention import CpuPages, PagedCall
from vllm_sepllm.engine.cpu.metadata import KeptMetadata, KeptMetadataBuilder, StepWork
from vllm_sepllm.engine.cpu.plan import Staircase
from vllm_sepllm.engine.cpu.tables import IntArray
from vllm_sepllm.engine.worker.backend import SepLLMBackend, SepLLMImpl
from vllm_sepllm.engine.worker.metadata import WindowMetadata, WindowMetadataBuilder


class SepLLMCPUBackend(SepLLMBackend):
    """Window group of the backend on CPU."""

    supported_dtypes: ClassVar[list[torch.dtype]] = CPUAttentionBackend.supported_dtypes
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_impl_cls() -> type[SepLLMCPUImpl]:
        """The implementation."""
        return SepLLMCPUImpl

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


class KeptCPUBackend(SepLLMCPUBackend):
    """Kept group of the backend on CPU."""

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The builder of this group."""
        return KeptMetadataBuilder


def kernel_isa(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """Instruction set of vLLM's kernel for pages of so many tokens and heads of that size: vLLM's
    choice, but never AMX. With it vLLM 0.32 answers SmolLM2 in bfloat16 wrongly, under full
    attention, too."""
    isa = str(_get_attn_isa(dtype, block_size, head_size, "auto"))
    return "vec" if isa == "amx" else isa


class SepLLMCPUImpl(SepLLMImpl):
    """Attention of one layer over its window and its kept stream, on CPU."""

    kept_backend = KeptCPUBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pages: CpuPages | None = None

    @classmethod
    def dense_backend(cls) -> type[AttentionBackend]:
        """vLLM's backend for layers that keep full attention."""
        return CPUAttentionBackend

    def bind_pages(self, kv_cache: torch.Tensor, staging_start: int) -> None:
        """Find this layer's pages in the buffer vLLM has just allocated.

        Args:
            kv_cache: the layer's view of the buffer.
            staging_start: bytes of the buffer that belong to layers; staging pages follow.
        """
        isa = kernel_isa(kv_cache.dtype, kv_cache.shape[2], self.head_size)
        self._pages = CpuPages(kv_cache, staging_start, isa)

    def write_and_attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        window: WindowMetadata,
        kept: KeptMetadata,
        output: torch.Tensor,
    ) -> None:
        """See :class:`SepLLMImpl`."""
        pages = self._pages
        assert pages is not None, "SepLLMCPUImpl.bind_pages was not called"
        num_tokens = int(kept.batch.query_start[-1])
        slots = window.slot_mapping[:num_tokens]
        pages.write(key[:num_tokens], value[:num_tokens], slots)
        if kept.token_index.numel():  # index_select: a third of the time of indexing
            kept_key, kept_value = (x.index_select(0, kept.token_index) for x in (key, value))
            self._write_stream(kept, pages, kept_key, kept_value)
        work = self._work(kept, window, pages, query.dtype)
        if work.paged is not None:
            self._run_paged(work, pages, query[:num_tokens], output[:num_tokens])
        for stairs, masks in zip(work.plan.staircase, work.masks, strict=True):
            self._run_staircase(kept, stairs, masks, pages, query, key, value, output)

    def _write_stream(
        self, kept: KeptMetadata, pages: CpuPages, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write the kept tokens' ``[num_kept, num_kv_heads, head_size]``."""
        shifts = kept.key_shifts
        if self.rotation is not None and shifts is not None:
            cos_sin = kept.cos_sin(self.rotation, "keys", lambda: shifts)
            key = self.rotation.rotate(key, cos_sin)
        pages.write(key, value, kept.slot_mapping)

    def _work(
        self, kept: KeptMetadata, window: WindowMetadata, pages: CpuPages, dtype: torch.dtype
    ) -> StepWork:
        """The step's work, made by the first layer that asks."""
        key = window, self.num_heads
        if key not in kept.works:
            plan = kept.plan(window, pages.block_size)
            paged, token_index = None, None
            if plan.paged is not None:
                batch, reads = plan.batch, plan.paged
                sizes = self.num_heads, self.num_kv_heads, self.head_size
                paged = PagedCall(reads, *sizes, dtype, pages.isa)
                if plan.staircase:
                    firsts, counts = batch.query_start[reads.requests], np.diff(reads.query_start)
                    spans = zip(firsts.tolist(), counts.tolist(), strict=True)
                    token_index = torch.cat([torch.arange(i, i + n) for i, n in spans])
            masks = [
                kept.masks.setdefault((pages.block_size, number), {})
                for number in range(len(plan.staircase))
            ]
            kept.works[key] = StepWork(plan, paged, token_index, masks)
        return kept.works[key]

    def _run_paged(
        self, work: StepWork, pages: CpuPages, query: torch.Tensor, output: torch.Tensor
    ) -> None:
        assert work.paged is not None
        options = self.scale, self.logits_soft_cap, self.rotation
        if work.token_index is None:
            work.paged.run(pages, query, output, *options)
            return
        part = query.index_select(0, work.token_index)
        result = torch.empty_like(part)
        work.paged.run(pages, part, result, *options)
        output.index_copy_(0, work.token_index, result)

    def _run_staircase(
        self,
        kept: KeptMetadata,
        stairs: Staircase,
        masks: dict[int, torch.Tensor],
        pages: CpuPages,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        chunk, stop = (int(x) for x in kept.batch.query_start[stairs.request : stairs.request + 2])
        first = chunk + stairs.first_query
        stream_key, stream_value = pages.read_pages(torch.from_numpy(stairs.stream_pages))
        own = key[chunk + stairs.chunk_first : stop], value[chunk + stairs.chunk_first : stop]
        window_key, window_value = (part.transpose(0, 1) for part in own)
        if stairs.window_length:
            read = pages.read_pages(torch.from_numpy(stairs.window_pages))
            before = slice(stairs.window_first, stairs.window_first + stairs.window_length)
            window_key = torch.cat([read[0][:, before], window_key], dim=1)
            window_value = torch.cat([read[1][:, before], window_value], dim=1)
        starts = stairs.stream_starts
        output[first:stop] = kept_prefill(
            query[first:stop],
            stream_key,
            stream_value,
            window_key,
            window_value,
            torch.from_numpy(stairs.stream_limits),
            kept.rule.window_size,
            self.scale,
            self.logits_soft_cap,
            masks,
            stream_starts=None if starts is None else torch.from_numpy(starts),
            num_sinks=kept.rule.num_sink_tokens,
            stream_query=self._rotated(kept, stairs, stairs.stream_shifts, query[first:stop]),
            sink_query=self._rotated(kept, stairs, stairs.sink_shifts, query[first:stop]),
        )

    def _rotated(
        self, kept: KeptMetadata, stairs: Staircase, shifts: IntArray, query: torch.Tensor
    ) -> torch.Tensor | None:
        """Queries of a chunk as they meet keys at cache positions; ``None`` is as they are."""
        if self.rotation is None or kept.key_shifts is None:
            return None
        key = stairs.request, shifts is stairs.sink_shifts
        return self.rotation.rotate(
            query, kept.cos_sin(self.rotation, key, lambda: torch.from_numpy(shifts))
        )
