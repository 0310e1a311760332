"""Steps of the V2 model runner on a CPU."""

from __future__ import annotations

from vllm_sepllm.engine.cpu.counts import KeptRows
from vllm_sepllm.engine.cpu.metadata import KeptMetadataBuilder
from vllm_sepllm.engine.worker.model_state import SepLLMModelState


class SepLLMCPUModelState(SepLLMModelState):
    """Counts on CPU."""

    kept_builder = KeptMetadataBuilder
    has_unreal_metadata = False

    def make_rows(self) -> KeptRows:
        """Rows of whole requests."""
        return KeptRows.of(self.vllm_config)
