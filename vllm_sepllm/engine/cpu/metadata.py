"""What a step's batch reads and writes on CPU, worked out once per step for all layers.

The builder of the kept group finds the kept tokens. Which pages a query reads depends on both
groups, so the plan is made when the first layer asks for it (:meth:`KeptMetadata.plan`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_sepllm.engine.cpu.counts import KeptStep, KeptTokens
from vllm_sepllm.engine.cpu.plan import Batch, BatchPlan, IntArray, TableArray, plan_batch
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.metadata import WindowMetadata
from vllm_sepllm.engine.worker.rotary import Rotation
from vllm_sepllm.engine.worker.runner_steps import RunnerSteps
from vllm_sepllm.policy import KeepRule

_NO_SLOTS = np.zeros(0, dtype=np.int64)


@dataclass
class KeptMetadata(AttentionMetadata):
    """The kept group's part of a batch.

    Attributes:
        batch: token ranges, kept counts and the stream's block table.
        token_index: ``[num_kept]`` int64, batch index of each kept token.
        slot_mapping: ``[num_kept]`` int64, stream slot of each kept token.
        key_lags: ``[num_kept]`` int64, positions that each of their keys is turned back by to be
            at its entry; ``None`` if not in cache positions.
        work: what layers have made of the plan, for the other layers of the step.
    """

    rule: KeepRule
    batch: Batch
    token_index: torch.Tensor
    slot_mapping: torch.Tensor
    key_lags: torch.Tensor | None = None
    work: dict[Any, Any] = field(default_factory=dict)

    def plan(self, window: WindowMetadata, block_size: int) -> BatchPlan:
        """How the batch reads both groups."""
        return plan_batch(
            self.rule,
            self.batch,
            window.block_table.numpy(),
            block_size,
            in_cache_positions=self.key_lags is not None,
        )

    def rows(self, rotation: Rotation, name: Any, lags: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Rows that turn back by ``lags``, made by the first layer that has this rotation.

        Args:
            rotation: of the layer.
            name: of the lags among those of the step.
            lags: gives them, ``[num_rows]`` int64.
        """
        key = (rotation, name)
        if key not in self.work:
            self.work[key] = rotation.rows(-lags())
        found: torch.Tensor = self.work[key]
        return found


class KeptMetadataBuilder(AttentionMetadataBuilder[KeptMetadata]):
    """Builder of the kept group."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Set once where the runner has no way to hand over the step with every batch (V1).
        self.steps: RunnerSteps | None = None
        options = Settings.of(self.vllm_config).config
        self._in_cache_positions = options.position_mode == "cache"

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        step: KeptStep | None = None,
    ) -> KeptMetadata:
        """Find the kept tokens of the batch and their stream slots.

        Args:
            common_prefix_len: vLLM's, not needed here.
            common_attn_metadata: the batch, with the block table of this group.
            fast_build: vLLM's, not needed here.
            step: what the batch is (V2).
        """
        if self.steps is not None:
            step = self.steps.current()
        assert step is not None, "the builder was not told what the batch is"
        common = common_attn_metadata
        found = step.kept_tokens(common.query_start_loc_cpu.numpy(), common.seq_lens.numpy())
        block_table, kept = common.block_table_tensor.numpy(), found.index
        slots = self._slots(block_table, found) if kept.size else _NO_SLOTS
        spans = found.query_start, found.starts, found.stops
        batch = Batch(*spans, found.rows, step.rows.table, block_table)
        rule = step.rows.rule
        metadata = KeptMetadata(rule, batch, torch.from_numpy(kept), torch.from_numpy(slots))
        if self._in_cache_positions:
            metadata.key_lags = torch.from_numpy(found.position - found.entry)
        return metadata

    def _slots(self, block_table: TableArray, found: KeptTokens) -> IntArray:
        size = self.kv_cache_spec.block_size
        pages = block_table[found.request, found.entry // size].astype(np.int64)
        return pages * size + found.entry % size
