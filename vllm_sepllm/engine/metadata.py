"""What a step's batch reads and writes, worked out once per step for all layers.

vLLM calls one builder per KV-cache group. The window group's keeps what it is given; the kept
group's finds the kept tokens. Which pages a query reads depends on both groups, so the plan is
made when the first layer asks for it (:meth:`KeptMetadata.plan`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sepllm.engine.cpu_plan import Batch, BatchPlan, TableArray, plan_batch
from vllm_sepllm.engine.settings import kept_policy
from vllm_sepllm.policy import CountArray, KeptPolicy

IntArray = npt.NDArray[np.int64]
_NO_SLOTS = np.zeros(0, dtype=np.int64)


@dataclass
class WindowMetadata(AttentionMetadata):
    """The window group's part of a batch.

    Attributes:
        block_table: ``[num_reqs, max_pages]`` int32, page of each stretch of positions.
        slot_mapping: ``[num_tokens]`` int64, slot of each token.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor


@dataclass
class KeptMetadata(AttentionMetadata):
    """The kept group's part of a batch.

    Attributes:
        batch: token ranges, kept counts and the stream's block table.
        token_index: ``[num_kept]`` int64, batch index of each kept token.
        slot_mapping: ``[num_kept]`` int64, stream slot of each kept token.
        work: what layers have made of the plan, for the other layers of the step.
    """

    policy: KeptPolicy
    batch: Batch
    token_index: torch.Tensor
    slot_mapping: torch.Tensor
    work: dict[Any, Any] = field(default_factory=dict)

    def plan(self, window: WindowMetadata, block_size: int) -> BatchPlan:
        """How the batch reads both groups."""
        return plan_batch(self.policy, self.batch, window.block_table.numpy(), block_size)


class KeptRows:
    """``kept_prefix`` of every request in the batch, by position.

    Indexed by position, a row needs no roll-back: whatever is computed again (rejected drafts,
    a preempted request) is simply written again.

    Attributes:
        table: ``[max_num_reqs, max_model_len + 1]`` int32; memory is touched as rows grow.
    """

    def __init__(self, policy: KeptPolicy, max_num_reqs: int, max_model_len: int) -> None:
        self._policy = policy
        self.table: CountArray = np.zeros((max_num_reqs, max_model_len + 1), dtype=np.int32)
        self._counted = np.zeros(max_num_reqs, dtype=np.int64)
        self._rows: dict[str, tuple[int, object]] = {}
        self._free = list(range(max_num_reqs))

    def assign(self, req_ids: list[str], states: dict[str, Any]) -> IntArray:
        """Row of each request; a new request under an old id gets a fresh one.

        Args:
            req_ids: requests of this step.
            states: the runner's state object of every request it knows.
        """
        rows = np.empty(len(req_ids), dtype=np.int64)
        for index, req_id in enumerate(req_ids):
            state = states.get(req_id)
            held = self._rows.get(req_id)
            if held is None or held[1] is not state:
                row = held[0] if held is not None else self._take(req_ids, states)
                self._counted[row] = 0
                held = self._rows[req_id] = (row, state)
            rows[index] = held[0]
        return rows

    def _take(self, req_ids: list[str], states: dict[str, Any]) -> int:
        """A free row; rows of requests that have ended are given back first."""
        for keep in (states, set(req_ids)):
            for req_id in [r for r in self._rows if r not in keep]:
                self._free.append(self._rows.pop(req_id)[0])
            if self._free:
                break
        return self._free.pop()

    def count(
        self,
        rows: IntArray,
        token_ids: npt.NDArray[np.int32],
        starts: IntArray,
        stops: IntArray,
    ) -> None:
        """Count the tokens of this step, and earlier ones of which this is the first sight.

        Args:
            rows: ``[num_reqs]`` from :meth:`assign`.
            token_ids: ``[num_reqs, max_model_len]`` ids of each request by position.
            starts, stops: ``[num_reqs]`` positions ``[start, stop)`` of this step.
        """
        one = (stops == starts + 1) & (self._counted[rows] >= starts)
        if one.all():
            self._count_one(rows, token_ids[np.arange(rows.size), starts], starts)
        else:
            index = one.nonzero()[0]
            self._count_one(rows[index], token_ids[index, starts[index]], starts[index])
            for i in (~one).nonzero()[0]:
                start = min(int(starts[i]), int(self._counted[rows[i]]))
                self._count_span(self.table[rows[i]], token_ids[i], start, int(stops[i]))
        self._counted[rows] = stops

    def _count_one(self, rows: IntArray, token_ids: IntArray, positions: IntArray) -> None:
        flags = self._policy.kept_flags_at(token_ids, positions)
        self.table[rows, positions + 1] = self.table[rows, positions] + flags

    def _count_span(
        self, row: CountArray, token_ids: npt.NDArray[np.int32], start: int, stop: int
    ) -> None:
        kept = self._policy.kept_flags(token_ids[start:stop], start)
        np.cumsum(kept, out=row[start + 1 : stop + 1])
        row[start + 1 : stop + 1] += row[start]


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Builder of the window group."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

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


class KeptMetadataBuilder(AttentionMetadataBuilder[KeptMetadata]):
    """Builder of the kept group. :meth:`attach` must be called before the first step."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._policy = kept_policy(vllm_config)
        self._rows = KeptRows(
            self._policy,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )
        self._runner: Any = None

    def attach(self, runner: Any) -> None:
        """Give access to token ids: ``input_batch`` and ``requests`` of the V1 runner."""
        self._runner = runner

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KeptMetadata:
        """Find the kept tokens of the batch and their stream slots."""
        assert self._runner is not None, "KeptMetadataBuilder.attach was not called"
        common = common_attn_metadata
        input_batch = self._runner.input_batch
        req_ids = input_batch.req_ids[: common.num_reqs]
        num_reqs = len(req_ids)
        query_start = common.query_start_loc_cpu.numpy()[: num_reqs + 1]
        stops = common.seq_lens.numpy()[:num_reqs]
        starts = stops - (query_start[1:] - query_start[:-1])
        rows = self._rows.assign(req_ids, self._runner.requests)
        self._rows.count(rows, input_batch.token_ids_cpu, starts, stops)

        if query_start[-1] == num_reqs == np.count_nonzero(stops > starts):  # one token each
            request, row, position = np.arange(num_reqs), rows, starts
        else:
            request = np.repeat(np.arange(num_reqs), stops - starts)
            offset = starts - query_start[:-1]  # position less batch index
            row, position = rows[request], np.arange(request.size) + offset[request]
        counts = self._rows.table
        entry = counts[row, position]
        kept = (counts[row, position + 1] > entry).nonzero()[0]
        block_table = common.block_table_tensor.numpy()
        slots = self._slots(block_table, request[kept], entry[kept]) if kept.size else _NO_SLOTS
        batch = Batch(query_start, starts, stops, rows, counts, block_table)
        return KeptMetadata(self._policy, batch, torch.from_numpy(kept), torch.from_numpy(slots))

    def _slots(self, block_table: TableArray, request: IntArray, entry: CountArray) -> IntArray:
        size = self.kv_cache_spec.block_size
        pages = block_table[request, entry // size].astype(np.int64)
        return pages * size + entry % size
