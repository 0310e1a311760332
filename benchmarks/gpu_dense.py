"""Dense attention kernels that ours are compared with, each if it is installed.

A function takes queries ``[num_tokens, num_heads, head_size]`` and keys and values ``[batch,
context, num_kv_heads, head_size]``, and returns a call that attends once and returns the results,
``[num_tokens, num_heads, head_size]`` in its first or first two dimensions, or ``None`` where the
kernel is not for such a batch. Tokens of a request are its last ones. What can be prepared once for
all layers of a step is prepared outside of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], torch.Tensor] | None
Prepare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], Call]
FLEX_CONTEXT = 32768  # it is compiled for each shape anew, which takes a while


def heads_first(query: torch.Tensor, *dense: torch.Tensor) -> list[torch.Tensor]:
    """``[batch, heads, tokens, size]`` of each."""
    num_reqs = dense[0].shape[0]
    rows = query.view(num_reqs, -1, *query.shape[1:])
    return [x.transpose(1, 2) for x in (rows, *dense)]


def torch_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, page: int) -> Call:
    """PyTorch's scaled dot product attention."""
    q, k, v = heads_first(query, key, value)
    causal = q.shape[2] > 1
    attend = partial(scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    return lambda: attend(q, k, v).transpose(1, 2)


def torch_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, page: int) -> Call:
    """PyTorch's FlexAttention, which splits keys for short queries."""
    if key.shape[1] != FLEX_CONTEXT or not key.is_cuda:
        return None
    q, k, v = (x.contiguous() for x in heads_first(query, key, value))
    mask = causal_blocks(q.shape[2]) if q.shape[2] > 1 else None
    attend = compiled_flex()
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


@cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    """One for all inputs: each other one is compiled anew, and only a few are kept."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def causal_blocks(num_tokens: int) -> object:
    """A prompt's mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, num_tokens, num_tokens)


def paged(dense: torch.Tensor, page: int) -> torch.Tensor:
    """Pages one after the other, ``[num_pages, page, num_kv_heads, head_size]``."""
    return dense.view(-1, page, *dense.shape[2:])


def vllm_triton(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, page: int) -> Call:
    """vLLM's Triton backend."""
    from vllm.v1.attention.backends.triton_attn import NUM_PAR_SOFTMAX_SEGMENTS as SEGMENTS
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    num_reqs, context, num_kv_heads, head_size = key.shape
    tokens = query.shape[0] // num_reqs
    index = {"dtype": torch.int32, "device": query.device}
    table = torch.arange(num_reqs * context // page, **index).view(num_reqs, -1)
    starts = torch.arange(0, num_reqs * tokens + 1, tokens, **index)
    lengths = torch.full((num_reqs,), context, **index)
    threshold = 128 // num_kv_heads
    segments = (threshold, query.shape[1], SEGMENTS)
    buffers = [torch.empty(*segments, head_size, device=query.device)]
    buffers += [torch.empty(segments, device=query.device) for _ in range(2)]
    output = torch.empty_like(query)
    attend = partial(
        unified_attention,
        q=query,
        k=paged(key, page),
        v=paged(value, page),
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=tokens,
        seqused_k=lengths,
        max_seqlen_k=context,
        softmax_scale=head_size**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=table,
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=SEGMENTS,
        softmax_segm_output=buffers[0],
        softmax_segm_max=buffers[1],
        softmax_segm_expsum=buffers[2],
    )

    def call() -> torch.Tensor:
        attend()
        return output

    return call


def flash_attention_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, page: int
) -> Call:
    """FlashAttention-3 of vLLM's wheel."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    num_reqs, context, num_kv_heads, head_size = key.shape
    tokens = query.shape[0] // num_reqs
    index = {"dtype": torch.int32, "device": query.device}
    starts = torch.arange(0, num_reqs * tokens + 1, tokens, **index)
    lengths = torch.full((num_reqs,), context, **index)
    longest = {"max_seqlen_q": tokens, "max_seqlen_k": context}
    schedule = get_scheduler_metadata(
        batch_size=num_reqs,
        num_heads_q=query.shape[1],
        num_heads_kv=num_kv_heads,
        headdim=head_size,
        cache_seqlens=lengths,
        qkv_dtype=query.dtype,
        cu_seqlens_q=starts,
        page_size=page,
        causal=True,
        **longest,
    )
    return partial(
        flash_attn_varlen_func,
        q=query,
        k=paged(key, page),
        v=paged(value, page),
        cu_seqlens_q=starts,
        seqused_k=lengths,
        causal=True,
        block_table=torch.arange(num_reqs * context // page, **index).view(num_reqs, -1),
        scheduler_metadata=schedule,
        fa_version=3,
        **longest,
    )


DENSE_KERNELS: dict[str, Prepare] = {
    "FlashAttention-3": flash_attention_3,
    "vLLM Triton": vllm_triton,
    "FlexAttention": torch_flex,
    "torch SDPA": torch_sdpa,
}
