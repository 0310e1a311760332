"""What a step's batch reads and writes on CPU, worked out once per step for all layers.

The builder of the kept group finds the kept tokens. Which pages a query reads depends on both
groups, so the plan is made when the first layer asks for it (:meth:`KeptMetadata.plan`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from vllm_sepllm.engine.cpu.attention import PagedCall
from vllm_sepllm.engine.cpu.counts import HostStep, KeptTokens, Masks
from vllm_sepllm.engine.cpu.plan import Batch, BatchPlan, plan_batch
from vllm_sepllm.engine.cpu.tables import IntArray, TableArray
from vllm_sepllm.engine.worker.metadata import KeptBuilder, WindowMetadata
from vllm_sepllm.engine.worker.rotation import Rotation
from vllm_sepllm.policy import KeepRule

_NO_SLOTS = np.zeros(0, dtype=np.int64)


# Of the step's kept keys, or of a request's queries as they meet the stream, or the sinks.
ShiftName = Literal["keys"] | tuple[int, bool]


@dataclass
class StepWork:
    """What a step's plan turns into, shared by all layers of a group.

    Attributes:
        plan: how the batch reads both groups.
        paged: the call of the C++ kernel, if any.
        token_index: batch index of the paged queries; ``None`` is all, in order.
        masks: of each staircase, by the block of rows they are for.
    """

    plan: BatchPlan
    paged: PagedCall | None
    token_index: torch.Tensor | None
    masks: list[dict[int, torch.Tensor]] = field(default_factory=list)


@dataclass
class KeptMetadata(AttentionMetadata):
    """The kept group's part of a batch.

    Attributes:
        batch: token ranges, kept counts and the stream's block table.
        token_index: ``[num_kept]`` int64, batch index of each kept token.
        slot_mapping: ``[num_kept]`` int64, stream slot of each kept token.
        key_shifts: ``[num_kept]`` int64, positions that each of their keys is rotated back by to be
            at its entry; ``None`` if not in cache positions.
        works: what layers have made of the plan, for the other layers of the step: by window group
            and number of heads.
        masks: the step's, of all groups.
        rotations: cosines and sines of shifts, by the layers' rotation and the shifts' name.
    """

    rule: KeepRule
    batch: Batch
    token_index: torch.Tensor
    slot_mapping: torch.Tensor
    key_shifts: torch.Tensor | None = None
    works: dict[tuple[WindowMetadata, int], StepWork] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    rotations: dict[tuple[Rotation, ShiftName], torch.Tensor] = field(default_factory=dict)

    def plan(self, window: WindowMetadata, block_size: int) -> BatchPlan:
        """How the batch reads both groups."""
        return plan_batch(
            self.rule,
            self.batch,
            window.block_table.numpy(),
            block_size,
            in_cache_positions=self.key_shifts is not None,
        )

    def cos_sin(
        self, rotation: Rotation, name: ShiftName, shifts: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What rotates back by ``shifts``, made by the first layer that has this rotation.

        Args:
            rotation: of the layer.
            name: of the shifts among those of the step.
            shifts: gives them, ``[num_queries]`` int64.
        """
        key = rotation, name
        if key not in self.rotations:
            self.rotations[key] = rotation.cos_sin(-shifts())
        return self.rotations[key]


class KeptMetadataBuilder(KeptBuilder):
    """Builder of the kept group."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        step: HostStep | None = None,
    ) -> KeptMetadata:
        """Find the kept tokens of the batch and their stream slots.

        Args:
            common_prefix_len: vLLM's, not needed here.
            common_attn_metadata: the batch, with the block table of this group.
            fast_build: vLLM's, not needed here.
            step: what the batch is (V2).
        """
        step = self.step_of(step)
        assert step is not None, "the builder was not told what the batch is"
        common = common_attn_metadata
        found = step.kept_tokens(common.query_start_loc_cpu.numpy(), common.seq_lens.numpy())
        block_table, kept = common.block_table_tensor.numpy(), found.index
        slots = self._slots(block_table, found) if kept.size else _NO_SLOTS
        spans = found.query_start, found.starts, found.stops
        batch = Batch(*spans, found.rows, step.counts.table, block_table)
        rule = step.counts.rule
        index = torch.from_numpy(kept), torch.from_numpy(slots)
        metadata = KeptMetadata(rule, batch, *index, masks=step.masks)
        if self.options.position_mode == "cache":
            metadata.key_shifts = torch.from_numpy(found.position - found.entry)
        return metadata

    def _slots(self, block_table: TableArray, found: KeptTokens) -> IntArray:
        size = self.kv_cache_spec.block_size
        pages = block_table[found.request, found.entry // size].astype(np.int64)
        return pages * size + found.entry % size
