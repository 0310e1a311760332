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

from vllm_sepllm.engine import settings
from vllm_sepllm.engine.cpu_plan import Batch, BatchPlan, IntArray, TableArray, plan_batch
from vllm_sepllm.engine.kept_rows import StepTokens
from vllm_sepllm.engine.metadata import WindowMetadata
from vllm_sepllm.engine.rotary import Rotation
from vllm_sepllm.policy import CountArray, KeptPolicy

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

    policy: KeptPolicy
    batch: Batch
    token_index: torch.Tensor
    slot_mapping: torch.Tensor
    key_lags: torch.Tensor | None = None
    work: dict[Any, Any] = field(default_factory=dict)

    def plan(self, window: WindowMetadata, block_size: int) -> BatchPlan:
        """How the batch reads both groups."""
        return plan_batch(
            self.policy,
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
        # Set once where the runner has no way to hand it over with every batch (V1).
        self.tokens: StepTokens | None = None
        options = settings.options(self.vllm_config)
        self._in_cache_positions = options.position_mode == "cache"

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        tokens: StepTokens | None = None,
    ) -> KeptMetadata:
        """Find the kept tokens of the batch and their stream slots.

        Args:
            common_prefix_len: vLLM's, not needed here.
            common_attn_metadata: the batch, with the block table of this group.
            fast_build: vLLM's, not needed here.
            tokens: token ids of the batch.
        """
        tokens = tokens or self.tokens
        assert tokens is not None, "the builder was not told where token ids are"
        common = common_attn_metadata
        query_start = common.query_start_loc_cpu.numpy()
        rows = tokens.count(common.num_reqs, query_start, common.seq_lens.numpy())
        num_reqs = len(rows)
        query_start = query_start[: num_reqs + 1]
        stops = common.seq_lens.numpy()[:num_reqs]
        starts = stops - (query_start[1:] - query_start[:-1])

        if query_start[-1] == num_reqs == np.count_nonzero(stops > starts):  # one token each
            request, row, position = np.arange(num_reqs), rows, starts
        else:
            request = np.repeat(np.arange(num_reqs), stops - starts)
            offset = starts - query_start[:-1]  # position less batch index
            row, position = rows[request], np.arange(request.size) + offset[request]
        counts = tokens.rows.table
        entry = counts[row, position]
        kept = (counts[row, position + 1] > entry).nonzero()[0]
        block_table = common.block_table_tensor.numpy()
        slots = self._slots(block_table, request[kept], entry[kept]) if kept.size else _NO_SLOTS
        batch = Batch(query_start, starts, stops, rows, counts, block_table)
        policy = tokens.rows.policy
        metadata = KeptMetadata(policy, batch, torch.from_numpy(kept), torch.from_numpy(slots))
        if self._in_cache_positions:
            metadata.key_lags = torch.from_numpy(position[kept] - entry[kept])
        return metadata

    def _slots(self, block_table: TableArray, request: IntArray, entry: CountArray) -> IntArray:
        size = self.kv_cache_spec.block_size
        pages = block_table[request, entry // size].astype(np.int64)
        return pages * size + entry % size
