"""What a step's batch reads and writes on a GPU, in buffers that CUDA graphs can refer to.

The builder of the kept group counts the step's kept tokens on the device, in one launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sepllm_kernels.batch import KeptBatch
from sepllm_kernels.paged.decode import make_plan, plan_for
from sepllm_kernels.paged.decode_plan import DecodePlan
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_sepllm.engine.gpu.counts import DeviceStep
from vllm_sepllm.engine.scheduling.spec import KeptSpec
from vllm_sepllm.engine.worker.backend import KEPT_SUFFIX
from vllm_sepllm.engine.worker.metadata import KeptBuilder, WindowMetadata, WindowMetadataBuilder
from vllm_sepllm.engine.worker.rotation import Rotation


@dataclass
class GPUKeptMetadata(AttentionMetadata):
    """The kept group's part of a batch.

    Attributes:
        query_start: ``[num_reqs + 1]`` int32, where each request's tokens begin.
        seq_lens: ``[num_reqs]`` int32, tokens.
        block_table: ``[num_reqs, max_pages]`` int32, page of each stretch of the stream.
        stream_slots: ``[num_tokens]`` int64, stream slot of each kept token; below 0 is none.
        stream_ranges: ``[num_tokens, 2]`` int32, stream entries that each token sees.
        window_size: tokens.
        num_sinks: entries seen beside the ranges; 0 without a bound on separators.
        num_decodes, num_decode_tokens: requests with few tokens, which come first, and those.
        max_decode_query_len: tokens of one of them at most.
        max_query_len: tokens of any request at most.
        cos_sin: in cache positions, ``[3, num_tokens, rotary_dim]`` float32 for each rotation of
            layers: how it rotates the keys and queries of tokens back by the shifts of
            ``kept_metadata``.
        plan: pieces of the requests with few tokens.
        window_spans: of the prompts, made by the first layer for all, if xformers computes them.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    stream_slots: torch.Tensor
    stream_ranges: torch.Tensor
    window_size: int
    num_sinks: int
    num_decodes: int
    num_decode_tokens: int
    max_decode_query_len: int
    max_query_len: int
    cos_sin: dict[Rotation, torch.Tensor]
    plan: DecodePlan
    window_spans: Any = None

    @property
    def num_reqs(self) -> int:
        """Requests of the batch, padding included."""
        return self.seq_lens.shape[0]

    def part(self, window: WindowMetadata, first: int, stop: int, longest: int) -> KeptBatch:
        """Requests ``[first, stop)``, of up to ``longest`` tokens each."""
        return KeptBatch(
            query_start=self.query_start[first : stop + 1],
            seq_lens=self.seq_lens[first:stop],
            window_table=window.block_table[first:stop],
            kept_table=self.block_table[first:stop],
            stream_ranges=self.stream_ranges,
            window_size=self.window_size,
            num_sinks=self.num_sinks,
            max_query_len=longest,
        )


class ReplayedBuilder(AttentionMetadataBuilder[Any]):
    """Of a group whose batches of few tokens per request can be replayed from CUDA graphs.

    Launches then depend on the number of requests and tokens alone; lengths are read on the device.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)


class GPUWindowMetadataBuilder(ReplayedBuilder, WindowMetadataBuilder):
    """Builder of the window group."""


class GPUKeptMetadataBuilder(ReplayedBuilder, KeptBuilder):
    """Builder of the kept group."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options = self.options
        self._window_size = options.window_size
        self._num_sinks = 0 if options.max_separator_tokens is None else options.num_sink_tokens
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        self._slots = torch.full((most,), -1, dtype=torch.int64, device=self.device)
        self._ranges = torch.zeros(most, 2, dtype=torch.int32, device=self.device)
        spec = self.kv_cache_spec
        assert isinstance(spec, KeptSpec)
        heads = spec.num_kv_heads, spec.head_size, spec.dtype.itemsize
        self._plan = plan_for(self.vllm_config.scheduler_config.max_num_seqs, *heads, self.device)
        self._shifts: torch.Tensor | None = None
        self._cos_sin: dict[Rotation, torch.Tensor] = {}
        if options.position_mode == "cache":
            self._shifts = torch.zeros(3 * most, dtype=torch.int32, device=self.device)
            for rotation in self._rotations():
                sizes = 3 * most, 2 * len(rotation.inv_freq)
                zeros = torch.zeros(sizes, dtype=torch.float32, device=self.device)
                self._cos_sin[rotation] = zeros

    def _rotations(self) -> set[Rotation]:
        """Of the group's layers."""
        layers = self.vllm_config.compilation_config.static_forward_context
        impls = [layers[name.removesuffix(KEPT_SUFFIX)].impl for name in self.layer_names]
        return {impl.rotation for impl in impls if impl.rotation is not None}

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        step: DeviceStep | None = None,
    ) -> GPUKeptMetadata:
        """Count the kept tokens of the batch and find their stream slots.

        Args:
            common_prefix_len: vLLM's, not needed here.
            common_attn_metadata: the batch, with the block table of this group.
            fast_build: vLLM's, not needed here.
            step: what the batch is (V2); ``None`` if it is of vLLM's own making.
        """
        common = common_attn_metadata
        num_reqs, num_tokens = common.num_reqs, common.num_actual_tokens
        step = self.step_of(step)
        slots, ranges = self._slots[:num_tokens], self._ranges[:num_tokens]
        shifts = (
            None if self._shifts is None else self._shifts[: 3 * num_tokens].view(3, num_tokens)
        )
        query_start = common.query_start_loc[: num_reqs + 1]
        seq_lens = common.seq_lens[:num_reqs]
        if step is None:  # nothing of it may be counted, or written to a stream
            slots.fill_(-1)
            ranges.zero_()
        else:
            step.counts.count(
                step.token_ids,
                step.index,
                query_start,
                seq_lens,
                common.block_table_tensor,
                self.kv_cache_spec.block_size,
                slots,
                ranges,
                shifts,
            )
        longest = self.reorder_batch_threshold
        assert longest is not None
        split = split_decodes_and_prefills(common, decode_threshold=longest)
        plan = self._plan.part(split[0])
        if split[0]:
            few = query_start[: split[0] + 1], seq_lens[: split[0]], ranges
            make_plan(*few, self._window_size, self._num_sinks, plan)
        return GPUKeptMetadata(
            query_start=query_start,
            seq_lens=seq_lens,
            block_table=common.block_table_tensor,
            stream_slots=slots,
            stream_ranges=ranges,
            window_size=self._window_size,
            num_sinks=self._num_sinks,
            num_decodes=split[0],
            num_decode_tokens=split[2],
            max_decode_query_len=longest,
            max_query_len=common.max_query_len,
            cos_sin=self._cos_sin_of(shifts),
            plan=plan,
        )

    def _cos_sin_of(self, shifts: torch.Tensor | None) -> dict[Rotation, torch.Tensor]:
        found = {}
        for rotation, buffer in self._cos_sin.items():
            assert shifts is not None
            found[rotation] = buffer[: shifts.numel()].view(*shifts.shape, -1)
            found[rotation].copy_(rotation.cos_sin(-shifts.flatten()).view_as(found[rotation]))
        return found
