"""Steps of the V2 model runner on a GPU."""

from __future__ import annotations

from vllm_sepllm.engine.gpu.counts import DeviceCounts
from vllm_sepllm.engine.worker.model_state import SepLLMModelState


class SepLLMGPUModelState(SepLLMModelState):
    """Counts on the device."""

    has_unreal_metadata = True

    def make_counts(self) -> DeviceCounts:
        """Counts of what a step needs."""
        return DeviceCounts.of(self.vllm_config, self.device)
