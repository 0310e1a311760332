"""What backends of SepLLM attention share: two KV-cache groups per layer, one attention over both.

vLLM gives the attention layer the window group. A second, small layer object
(:class:`KeptLayer`) stands for the kept group: vLLM plans, allocates and binds its pages like
any layer's, and this layer's implementation finds them by name.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.names import BACKEND_NAME
from vllm_sepllm.engine.scheduling.spec import kept_spec, window_spec
from vllm_sepllm.engine.startup.checks import OTHER_BACKEND
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.metadata import WindowMetadata
from vllm_sepllm.engine.worker.rotation import Rotation
from vllm_sepllm.layers import Layer, LayerPlan

KEPT_SUFFIX = ".kept"


def layer_index(name: str) -> int:
    """Index of the layer an attention module belongs to, counted over all pipeline stages."""
    return int(extract_layer_index(name))


def is_dense(layers: LayerPlan, name: str) -> bool:
    """Whether an attention module is of a dense layer. Not every name has one index."""
    return bool(layers.dense) and layers[layer_index(name)] is Layer.DENSE


class SepLLMBackend(AttentionBackend):
    """Window group of a backend, and what vLLM selects by name."""

    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enumeration."""
        return BACKEND_NAME

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors move pages they take for dense ones."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Full attention in, the window group out; the kept group's own and others stay."""
        if type(spec) is not FullAttentionSpec:
            return spec
        return window_spec(spec, Settings.of(get_current_vllm_config()))


class KeptLayer(torch.nn.Module, AttentionLayerBase):
    """Stands for the kept group of one attention layer.

    Args:
        backend: of the kept group.
        window_spec: of the attention layer.
    """

    def __init__(self, backend: type[AttentionBackend], window_spec: FullAttentionSpec) -> None:
        super().__init__()
        self._backend = backend
        self._window_spec = window_spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend of the kept group."""
        return self._backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The kept group's spec, with pages like the window group's."""
        spec = replace(self._window_spec, block_size=vllm_config.cache_config.block_size)
        return kept_spec(spec, Settings.of(vllm_config))


class SepLLMImpl(AttentionImpl):
    """Attention of one layer over its window and its kept stream.

    A subclass computes it on one kind of hardware.

    Attributes:
        kept_backend: of the kept group.
        kept_name: of the layer that stands for the kept group.
        rotation: in cache positions, how the layer rotates its keys; ``None`` if it does not.
    """

    kept_backend: ClassVar[type[AttentionBackend]]

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
        self.kept_name = ""
        self.rotation: Rotation | None = None

    @classmethod
    @abstractmethod
    def dense_backend(cls) -> type[AttentionBackend]:
        """vLLM's backend for layers that keep full attention."""

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
        if is_dense(Settings.of(vllm_config).layers, name):
            self._make_dense(layer, act_dtype)
            return
        self.kept_name = name + KEPT_SUFFIX
        spec = layer.get_kv_cache_spec(vllm_config)
        layers.setdefault(self.kept_name, KeptLayer(self.kept_backend, spec))
        self.prepare(vllm_config, layer)

    def prepare(self, vllm_config: VllmConfig, layer: Attention) -> None:
        """Allocate what attention of this layer needs beside pages."""

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
            kv_cache: the layer's pages, ``[num_pages, num_kv_heads, page_size, 2 * head_size]``.
            attn_metadata: the window group's part of the batch; ``None`` when vLLM warms up.
            output: ``[num_tokens, num_heads, head_size]``, written.
            output_scale, output_block_scale: fused output quantization, never asked for.
        """
        if attn_metadata is None:
            return output.zero_()
        kept = get_forward_context().attn_metadata[self.kept_name]
        self.write_and_attend(layer, query, key, value, kv_cache, attn_metadata, kept, output)
        return output

    @abstractmethod
    def write_and_attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        window: WindowMetadata,
        kept: Any,
        output: torch.Tensor,
    ) -> None:
        """:meth:`forward` of a step, with the parts of both groups."""

    def _make_dense(self, layer: Attention, act_dtype: torch.dtype) -> None:
        """Give the layer vLLM's own backend; only now is it known which layer it is."""
        backend = self.dense_backend()
        layer.attn_backend = backend
        layer.backend = AttentionBackendEnum[backend.get_name()]
        layer.impl = self._dense_impl(backend.get_impl_cls())
        layer.impl.process_weights_after_loading(act_dtype)

    def _dense_impl(self, impl_class: type[AttentionImpl[Any]]) -> AttentionImpl[Any]:
        return impl_class(
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
