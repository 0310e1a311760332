"""The two KV-cache groups of a SepLLM layer, as vLLM sees them.

==========  =================================  ==============================================
group       holds                              pages a request of ``T`` tokens holds
==========  =================================  ==============================================
window      every token, at its position;      ``ceil((n-1)/B) + 1`` and the pages of the chunk
            pages behind the window are freed  being computed
kept        sinks and separators only, densely ``ceil(kept/B)``; with a bound on separators
            packed in order ("the stream")     those of the sinks and of the newest ones
==========  =================================  ==============================================

Both draw pages of the same size from vLLM's one block pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.scheduling.kept_manager import KeptManager
from vllm_sepllm.engine.scheduling.window_manager import WindowManager
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.planning import expected_kept_pages
from vllm_sepllm.policy import SeenStream

# The registry only loads vLLM's own entries while it is empty.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=WindowManager)
@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """The window group.

    A type of its own, so that a model's real sliding-window layers of the same width never
    share its group: the window and the kept layers of one attention layer must sit at the same
    place of their groups to share one buffer.
    """

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """vLLM's bound, which adds a page for a window that starts inside one; a window over
        the whole context starts at 0 and needs no such page."""
        bound = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(bound, cdiv(max_model_len, self.block_size))


@register_kv_cache_spec(manager_class=KeptManager)
@dataclass(frozen=True, kw_only=True)
class KeptSpec(AttentionSpec):
    """The kept group.

    Attributes:
        window_size: ``n``, tokens.
        num_sink_tokens: ``a``, tokens.
        max_separator_tokens: ``s``, kept tokens seen before the window beside the sinks.
        planned_share: kept tokens per token of a text that memory is planned for.
        fingerprint: of the options and of this package. vLLM compares specs of ranks, which may
            have been given other ones, or run another version.
    """

    window_size: int
    num_sink_tokens: int
    planned_share: float
    max_separator_tokens: int | None = None
    fingerprint: str = ""

    @property
    def uses_slot_mapping(self) -> bool:
        """Stream slots follow from kept counts, not from positions."""
        return False

    @cached_property
    def seen(self) -> SeenStream:
        """Which entries of the stream a query sees."""
        return SeenStream(self.num_sink_tokens, self.max_separator_tokens)

    def expected_pages(self, num_tokens: int, num_in_flight: int) -> int:
        """Pages planned for a request of the text that memory is planned for.

        Args:
            num_tokens: of the request.
            num_in_flight: tokens of it that steps in flight compute at most.
        """
        sizes = self.window_size, self.block_size, num_tokens, num_in_flight
        return expected_kept_pages(self.planned_share, self.seen, *sizes)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Memory planned for a request of ``max_model_len`` tokens of ordinary text.

        Together with the window group never more than full attention takes, so whatever length
        full attention can serve passes vLLM's check at start-up. Where that limit is what
        counts, the scheduler warns; a request that outgrows the pool is ended with an error.
        """
        max_len = vllm_config.model_config.max_model_len
        kept = self.expected_pages(max_len, vllm_config.max_in_flight_tokens)
        full = cdiv(max_len, self.block_size)
        return min(kept, full - self._window_pages(vllm_config)) * self.page_size_bytes

    def _window_pages(self, vllm_config: VllmConfig) -> int:
        window: Any = WindowSpec(
            block_size=self.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            sliding_window=self.window_size,
        )
        return window.max_admission_blocks_per_request(
            vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
        )


# Fields of a full-attention layer's spec that its groups do not have.
_DROPPED = ("sliding_window", "attention_chunk_size", "non_causal")


def window_spec(spec: AttentionSpec, settings: Settings) -> WindowSpec:
    """Of the window group of a layer whose spec with full attention is ``spec``."""
    size = settings.config.window_size
    return replace_as(spec, WindowSpec, drop=_DROPPED, sliding_window=size)


def kept_spec(spec: AttentionSpec, settings: Settings) -> KeptSpec:
    """Of the kept group of the same layer, with pages like the window group's."""
    options = settings.config
    return replace_as(
        spec,
        KeptSpec,
        drop=_DROPPED,
        window_size=options.window_size,
        num_sink_tokens=options.num_sink_tokens,
        planned_share=settings.plan.planned_share,
        max_separator_tokens=options.max_separator_tokens,
        fingerprint=options.fingerprint,
    )


def window_specs(specs: Mapping[str, KVCacheSpec]) -> list[WindowSpec]:
    """Those of window groups."""
    return [spec for spec in specs.values() if isinstance(spec, WindowSpec)]


def check_fingerprint(manager: KeptManager, settings: Settings) -> None:
    """Whether the worker that a manager's spec is from keeps the same tokens as this process.

    Raises:
        ConfigError: it does not.
    """
    spec: Any = manager.kv_cache_spec
    if spec.fingerprint != settings.config.fingerprint:
        raise ConfigError(
            "SepLLM attention: a worker has other options, or another version of vllm-sepllm, than "
            "the scheduler: start every node with the same --additional-config and the same package"
        )
