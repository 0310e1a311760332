"""``kept_prefill_paged`` with xformers for the window: an alternative to the Triton kernel alone.

The window part is a band along the diagonal, which ``memory_efficient_attention_partial`` of
xformers computes over keys and values gathered from their pages; the stream part, a staircase that
xformers has no mask for, is the Triton kernel's. They are merged by their log-sum-exp.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from xformers.ops.fmha import memory_efficient_attention_partial
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

from sepllm_kernels.batch import KeptBatch, PagedKV
from sepllm_kernels.paged.prefill.triton import kept_prefill_paged


@dataclass(frozen=True)
class WindowSpans:
    """Positions that the tokens of a batch see in their windows, request after request.

    Attributes:
        tokens: of the batch, those of requests.
        bias: which of the positions each token sees; a mask of xformers.
        page, entry: ``[num_positions]`` int64, where each position is stored.
    """

    tokens: slice
    bias: Any
    page: torch.Tensor
    entry: torch.Tensor


def window_spans(batch: KeptBatch, page_size: int) -> WindowSpans | None:
    """Spans of a batch, the same for all layers of a step; ``None`` if no request has tokens.

    xformers takes lengths from the host, so this waits for the device.
    """
    starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    some = [req for req, count in enumerate(counts) if count]
    if not some:
        return None
    begins = [max(0, lengths[req] - counts[req] - batch.window_size + 1) for req in some]
    spans = [lengths[req] - begin for req, begin in zip(some, begins, strict=True)]
    device = batch.window_table.device
    bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(
        [counts[req] for req in some], spans, device=device
    ).make_local_attention_from_bottomright(batch.window_size)
    position = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, spans, strict=True)])
    req = torch.tensor(some).repeat_interleave(torch.tensor(spans))
    req, position = req.to(device), position.to(device)
    page = batch.window_table[req, position // page_size].long()
    return WindowSpans(slice(starts[0], starts[-1]), bias, page, position % page_size)


def has_kernel(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether xformers can attend such heads here: one token is tried.

    A wheel that was built for another CUDA than torch's imports, and has no kernel.
    """
    heads = torch.zeros(
        1, 1, num_kv_heads, num_heads // num_kv_heads, head_size, dtype=dtype, device=device
    )
    bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens([1], [1], device=device)
    bias = bias.make_local_attention_from_bottomright(1)
    try:
        memory_efficient_attention_partial(heads, heads, heads, attn_bias=bias, scale=1.0)
    except RuntimeError:  # no operator, or none that was built for this GPU
        return False
    return True


def read_pages(pages: torch.Tensor, spans: WindowSpans, scale: float, dtype: torch.dtype) -> Any:
    """``[num_positions, num_kv_heads, head_size]``."""
    found = pages[spans.page, :, spans.entry].to(dtype)
    return found if scale == 1.0 else found * scale


def kept_prefill_xformers(
    queries: torch.Tensor,
    pages: PagedKV,
    batch: KeptBatch,
    output: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    spans: WindowSpans | None = None,
) -> None:
    """Attend any number of tokens of each request to what they see.

    Arguments as :func:`kept_attention_reference`; ``spans`` are :func:`window_spans` of the batch,
    made here where they are not given.

    Raises:
        ValueError: a soft cap, which xformers does not have.
    """
    if logits_soft_cap:
        raise ValueError(f"logits_soft_cap={logits_soft_cap}: must be 0; use kept_prefill_paged")
    spans = spans or window_spans(batch, pages.page_size)
    if spans is None:
        return
    num_heads, head_size = queries.shape[-2:]
    num_kv_heads = pages.key.shape[1]
    stream = torch.empty(output.shape, dtype=torch.float32, device=output.device)
    stream_sums = torch.empty(output.shape[:2], dtype=torch.float32, device=output.device)
    without_window = replace(batch, window_size=0)
    kept_prefill_paged(queries, pages, without_window, stream, scale, log_sums=stream_sums)

    query = (queries[0] if queries.dim() == 4 else queries)[spans.tokens]
    key = read_pages(pages.key, spans, pages.key_scale, query.dtype)
    value = read_pages(pages.value, spans, pages.value_scale, query.dtype)
    grouped = (1, -1, num_kv_heads, num_heads // num_kv_heads, head_size)
    key, value = (x[None, :, :, None].expand(grouped) for x in (key, value))
    window, window_sums = memory_efficient_attention_partial(
        query.reshape(grouped), key, value, attn_bias=spans.bias, scale=scale
    )
    # The share of the stream: of two parts, the softmax over their log-sum-exps is a sigmoid.
    sums = window_sums.reshape(num_heads, -1)[:, : query.shape[0]].T
    share = torch.sigmoid(stream_sums[spans.tokens] - sums)[..., None]
    merged = window.reshape(query.shape).float().lerp(stream[spans.tokens], share)
    output[spans.tokens] = merged.to(output.dtype)
