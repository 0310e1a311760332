"""Builders of a step's metadata: that of the window group, and what those of the kept group share.

vLLM calls one builder per KV-cache group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.runner_steps import RunnerSteps


@dataclass(eq=False)  # one object per step and group
class WindowMetadata(AttentionMetadata):
    """The window group's part of a batch.

    Attributes:
        block_table: ``[num_reqs, max_pages]`` int32, page of each stretch of positions.
        slot_mapping: ``[num_tokens]`` int64, slot of each token; below 0 is none.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Builder of the window group."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> WindowMetadata:
        """Keep the block table and the slots."""
        return WindowMetadata(
            common_attn_metadata.block_table_tensor, common_attn_metadata.slot_mapping
        )


class KeptBuilder(AttentionMetadataBuilder[Any]):
    """What builders of the kept group share.

    Attributes:
        options: of the engine.
        steps: says what the batch is, where the runner cannot hand that over with it (V1).
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.options = Settings.of(self.vllm_config).config
        self.steps: RunnerSteps | None = None

    def step_of(self, given: Any) -> Any:
        """The step: that of ``steps``, or what was ``given`` with the batch (V2)."""
        return given if self.steps is None else self.steps.current()
