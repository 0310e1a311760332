"""``packed_attention`` through torch's FlexAttention, over the same packed order.

Keys are ``[kept stream, padded | all tokens]``. Over keys in the order of the text FlexAttention
would skip nothing: a block of 128 tokens nearly always has a separator in it. Here the blocks that
a block of queries sees follow from the plan's counts, and no mask is ever laid out.

It stands beside our own kernels for comparison on a GPU. FlexAttention has no backward pass on a
CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sepllm_kernels.sequence.packed.plan import PackedPlan

BLOCK = 128  # FlexAttention's own
BUCKET = 1024  # entries that the stream is padded to: for each length FlexAttention compiles anew


def padded_stream(plan: PackedPlan) -> int:
    """Entries of the stream with its padding."""
    return -(-plan.kept.shape[0] // BUCKET) * BUCKET


def mask_function(plan: PackedPlan) -> Callable[..., torch.Tensor]:
    """Whether a query sees a key of the packed order, as FlexAttention asks for it."""
    num_stream, window_first = padded_stream(plan), plan.window_first

    def is_seen(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        place = key - num_stream
        in_window = (place >= window_first[query]) & (place <= query)
        first, limit = plan.stream
        in_stream = (key >= first[query]) & (key < limit[query])
        if plan.sinks is not None:
            first, limit = plan.sinks
            in_stream = in_stream | ((key >= first[query]) & (key < limit[query]))
        return torch.where(key < num_stream, in_stream, in_window)

    return is_seen


def block_mask(plan: PackedPlan) -> BlockMask:
    """The blocks that hold what is seen, from the ends of it alone."""
    num_tokens, num_stream = plan.num_tokens, padded_stream(plan)
    device = plan.window_first.device
    first = torch.arange(0, num_tokens, BLOCK, device=device)
    last = (first + BLOCK).clamp(max=num_tokens) - 1
    block = torch.arange((num_stream + num_tokens + BLOCK - 1) // BLOCK, device=device)

    def between(lows: torch.Tensor, highs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of which any query, and of which every query sees ``[low, high)``."""
        low, high = block * BLOCK, (block + 1) * BLOCK
        some = (high > lows[first, None]) & (low < highs[last, None])
        every = (low >= lows[last, None]) & (high <= highs[first, None])
        return some & (lows[first] < highs[last])[:, None], every

    place = torch.arange(num_tokens, device=device)
    seen = [between(plan.window_first + num_stream, place + num_stream + 1)]
    seen += [between(*ends) for ends in plan.ranges]
    some = torch.stack([pair[0] for pair in seen]).any(0)
    full = torch.stack([pair[1] for pair in seen]).any(0)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(plan),
        seq_lengths=(num_tokens, num_stream + num_tokens),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[blocks of queries, blocks of keys]`` bool as counts and indices, those that are true
    first."""
    counts = blocks.sum(1, dtype=torch.int32)
    order = torch.argsort((~blocks).to(torch.int8), dim=1, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def packed_attention_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: PackedPlan,
    scale: float,
    *,
    blocks: BlockMask | None = None,
) -> torch.Tensor:
    """Attend each token of texts to its window and to its part of the stream of kept tokens.

    Arguments and result as :func:`packed_attention_reference`. ``blocks`` is :func:`block_mask` of
    the plan, made once for all layers of a step. On a CPU it is not compiled, lays out all logits
    and has no gradients.
    """
    padding = padded_stream(plan) - plan.kept.shape[0]

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        none = tensor.new_zeros(padding, *tensor.shape[1:])
        return torch.cat([tensor[plan.kept], none, tensor]).transpose(0, 1)[None]

    attend: Any = _compiled() if query.is_cuda else flex_attention
    output: torch.Tensor = attend(
        query.transpose(0, 1)[None],
        packed(key),
        packed(value),
        block_mask=block_mask(plan) if blocks is None else blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)
