"""SepLLM attention on a GPU: Triton kernels over the pages of both groups."""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from sepllm_kernels.batch import KeptBatch, PagedKV
from sepllm_kernels.paged.decode.triton import MAX_ROWS, DecodeBuffers, kept_decode, processors
from sepllm_kernels.paged.prefill.triton import kept_prefill_paged
from sepllm_kernels.rotate_queries import rotate_queries
from sepllm_kernels.write_kv import write_kv
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, MultipleOf, max_decode_query_len
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.gpu.metadata import (
    GPUKeptMetadata,
    GPUKeptMetadataBuilder,
    GPUWindowMetadataBuilder,
)
from vllm_sepllm.engine.startup.checks import BLOCK_MULTIPLE
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.backend import SepLLMBackend, SepLLMImpl
from vllm_sepllm.engine.worker.metadata import WindowMetadata

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
FP8 = torch.float8_e4m3fn
CAPABILITY = DeviceCapability(8, 0)  # asynchronous copies, bfloat16
FP8_CAPABILITY = DeviceCapability(8, 9)  # Triton converts e4m3 from there on


class SepLLMGPUBackend(SepLLMBackend):
    """Window group of the backend on a GPU."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_impl_cls() -> type[SepLLMGPUImpl]:
        """The implementation."""
        return SepLLMGPUImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The builder of this group."""
        return GPUWindowMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Any size that vLLM's own Triton backend takes."""
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Those the kernels are tested with."""
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Any, and first that in which a program reads what a page holds of its head in one run."""
        first = KVCacheLayout.LBHNC
        return (first, *(layout for layout in KVCacheLayout if layout is not first))

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability | None,
    ) -> str | None:
        """Refuse other hardware, where nothing has checked the configuration, and older GPUs."""
        if not (current_platform.is_cuda() or current_platform.is_cpu()):
            return "vllm-sepllm runs on CPU and CUDA"
        if device_capability is None:
            return None
        is_fp8 = str(kv_cache_dtype).startswith("fp8")
        if device_capability >= (FP8_CAPABILITY if is_fp8 else CAPABILITY):
            return None
        return (
            f"SepLLM attention needs compute capability {CAPABILITY.as_version_str()}, with FP8 "
            f"pages {FP8_CAPABILITY.as_version_str()}, and this GPU has "
            f"{device_capability.as_version_str()}"
        )

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Lengths are read on the device; launches follow the split into decodes and prefills."""
        return True


class KeptGPUBackend(SepLLMGPUBackend):
    """Kept group of the backend on a GPU."""

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The builder of this group."""
        return GPUKeptMetadataBuilder


_buffers: WeakValueDictionary[Any, DecodeBuffers] = WeakValueDictionary()


def shared_buffers(
    max_query_len: int, num_heads: int, num_kv_heads: int, head_size: int, device: torch.device
) -> DecodeBuffers:
    """Buffers of all layers of one shape; they compute one after the other.

    They end with these layers. In sleep mode vLLM allocates them among the weights, and starts no
    other engine in the process while some are left.
    """
    sizes = max_query_len, num_heads, num_kv_heads, head_size
    found = _buffers.get((sizes, device))
    if found is None:
        found = _buffers[sizes, device] = DecodeBuffers(*sizes, processors(device), device)
    return found


class SepLLMGPUImpl(SepLLMImpl):
    """Attention of one layer over its window and its kept stream, on a GPU."""

    kept_backend = KeptGPUBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffers: DecodeBuffers | None = None
        self._uses_xformers = False

    @classmethod
    def dense_backend(cls) -> type[AttentionBackend]:
        """vLLM's backend for layers that keep full attention."""
        return TritonAttentionBackend

    def prepare(self, vllm_config: VllmConfig, layer: Attention) -> None:
        """Allocate the decode kernel's buffers, if it takes this layer's heads and drafts."""
        longest = max_decode_query_len(vllm_config)
        if longest == 1 or longest * self.num_heads // self.num_kv_heads <= MAX_ROWS:
            sizes = self.num_heads, self.num_kv_heads, self.head_size
            self._buffers = shared_buffers(longest, *sizes, layer._k_scale.device)
        if Settings.of(vllm_config).config.prefill_kernel == "xformers":
            dtype, device = vllm_config.model_config.dtype, layer._k_scale.device
            problem = self._xformers_refusal(dtype, longest - 1, device)
            if problem:
                raise ConfigError(f"prefill_kernel='xformers' has {problem}: leave it out")
            self._uses_xformers = True

    def write_and_attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        window: WindowMetadata,
        kept: GPUKeptMetadata,
        output: torch.Tensor,
    ) -> None:
        """See :class:`SepLLMImpl`."""
        pages = self._pages(layer, kv_cache)
        num_tokens = kept.stream_slots.shape[0]
        slots = window.slot_mapping[:num_tokens]
        if self.rotation is None:
            write_kv(key, value, pages, slots, kept.stream_slots)
        else:
            cos_sin, is_neox = kept.cos_sin[self.rotation], self.rotation.is_neox
            write_kv(key, value, pages, slots, kept.stream_slots, cos_sin[0], is_neox)
            # For the stream, and for the sinks where they are a part of their own.
            parts = cos_sin[1:] if kept.num_sinks else cos_sin[1:2]
            query = rotate_queries(query[:num_tokens], parts, is_neox)
        first = kept.num_decodes if self._buffers is not None else 0
        options = self.scale, self.logits_soft_cap
        if first:
            batch = kept.part(window, 0, first, kept.max_decode_query_len)
            few = output[: kept.num_decode_tokens]
            kept_decode(query, pages, batch, few, *options, self._buffers, kept.plan)
        if first < kept.num_reqs:
            batch = kept.part(window, first, kept.num_reqs, kept.max_query_len)
            self._prefill(query, pages, batch, output[:num_tokens], kept)

    def _xformers_refusal(
        self, dtype: torch.dtype, num_drafts: int, device: torch.device
    ) -> str | None:
        if self.logits_soft_cap:
            return f"no soft cap of logits, and this model's is {self.logits_soft_cap}"
        if dtype == torch.float32 and current_platform.is_cuda():
            return "no kernel for float32"
        if self._buffers is None:  # it reads lengths on the host, which a CUDA graph cannot
            group = self.num_heads // self.num_kv_heads
            most = MAX_ROWS // group - 1
            return f"no way to verify {num_drafts} draft tokens, at most {most} with this model"
        from sepllm_kernels.paged.prefill import xformers_window

        heads = self.num_heads, self.num_kv_heads, self.head_size
        if not xformers_window.has_kernel(*heads, dtype, device):
            return (
                f"no kernel for {dtype} on this GPU (`python -m xformers.info` says which CUDA it "
                f"was built for, torch's is {torch.version.cuda})"
            )
        return None

    def _prefill(
        self,
        query: torch.Tensor,
        pages: PagedKV,
        batch: KeptBatch,
        output: torch.Tensor,
        kept: GPUKeptMetadata,
    ) -> None:
        if not self._uses_xformers:
            kept_prefill_paged(query, pages, batch, output, self.scale, self.logits_soft_cap)
            return
        from sepllm_kernels.paged.prefill import xformers_window

        if kept.window_spans is None:
            kept.window_spans = xformers_window.window_spans(batch, pages.page_size)
        xformers_window.kept_prefill_xformers(
            query, pages, batch, output, self.scale, spans=kept.window_spans
        )

    def _pages(self, layer: Any, kv_cache: torch.Tensor) -> PagedKV:
        if kv_cache.element_size() == 1:
            key, value = kv_cache.view(FP8).tensor_split(2, -1)
            return PagedKV(key, value, layer._k_scale_float, layer._v_scale_float)
        key, value = kv_cache.tensor_split(2, -1)
        return PagedKV(key, value)
