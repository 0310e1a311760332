"""Steps of the V2 model runner on a CPU."""

from __future__ import annotations

from vllm_sepllm.engine.cpu.counts import HostCounts
from vllm_sepllm.engine.worker.model_state import SepLLMModelState


class SepLLMCPUModelState(SepLLMModelState):
    """Counts on CPU."""

    has_unreal_metadata = False

    def make_counts(self) -> HostCounts:
        """Counts of whole requests."""
        return HostCounts.of(self.vllm_config)
