"""``kept_metadata`` in Triton: one launch per step, a program per request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import STEP_SIZES

TILE = 512  # tokens looked at at once


@triton.jit
def _count_tokens(
    token_ids,
    is_chosen,
    prefix,  # the request's row
    ring,
    first,
    num_tokens,
    start,
    vocab_size,
    num_sink_tokens,
    interval,
    TILE: tl.constexpr,
):
    """Write ``kept_prefix`` behind each token."""
    below = tl.load(prefix + start % ring)
    for done in range(0, num_tokens, TILE):
        offset = done + tl.arange(0, TILE)
        valid = offset < num_tokens
        position = start + offset
        token_id = tl.load(token_ids + first + offset, mask=valid, other=-1)
        known = valid & (token_id >= 0) & (token_id < vocab_size)
        chosen = tl.load(is_chosen + token_id, mask=known, other=0) != 0
        kept = chosen | (position < num_sink_tokens)
        if interval > 0:
            kept = kept | (position % interval == 0)
        kept = (kept & valid).to(tl.int32)
        counts = below + tl.cumsum(kept, 0)
        tl.store(prefix + (position + 1) % ring, counts, mask=valid)
        below += tl.sum(kept, 0)


@triton.jit(do_not_specialize=STEP_SIZES)
def _kept_metadata(
    token_ids,
    query_start,
    seq_lens,
    rows,
    kept_table,
    is_chosen,
    kept_prefix,
    stream_slots,
    stream_ranges,
    shifts,
    num_reqs,
    num_tokens,
    ring,
    table_stride,
    vocab_size,
    num_sink_tokens,
    window_size,
    interval,
    max_separators,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    req = tl.program_id(0)
    first = tl.load(query_start + req)
    if req == num_reqs:  # padding behind the last request
        for done in range(first, num_tokens, TILE):
            token = done + tl.arange(0, TILE)
            valid = token < num_tokens
            tl.store(stream_slots + token, -1, mask=valid)
            tl.store(stream_ranges + 2 * token, 0, mask=valid)
            tl.store(stream_ranges + 2 * token + 1, 0, mask=valid)
            if shifts is not None:
                for part in range(3):
                    tl.store(shifts + part * num_tokens + token, 0, mask=valid)
        return
    length = tl.load(query_start + req + 1) - first
    if length == 0:
        return
    start = tl.load(seq_lens + req) - length
    prefix = kept_prefix + tl.load(rows + req).to(tl.int64) * ring
    table = kept_table + req.to(tl.int64) * table_stride
    _count_tokens(
        token_ids,
        is_chosen,
        prefix,
        ring,
        first,
        length,
        start,
        vocab_size,
        num_sink_tokens,
        interval,
        TILE,
    )
    tl.debug_barrier()  # counts written by other threads of this program are read below
    for done in range(0, length, TILE):
        offset = done + tl.arange(0, TILE)
        valid = offset < length
        position = start + offset
        entry = tl.load(prefix + position % ring, mask=valid, other=0)
        kept = valid & (tl.load(prefix + (position + 1) % ring, mask=valid, other=0) > entry)
        page = tl.load(table + entry // PAGE, mask=kept, other=0).to(tl.int64)
        slot = tl.where(kept, page * PAGE + entry % PAGE, -1)
        tl.store(stream_slots + first + offset, slot, mask=valid)
        window_first = tl.maximum(position - window_size + 1, 0)
        limit = tl.load(prefix + window_first % ring, mask=valid, other=0)
        begin, unseen = tl.zeros_like(limit), tl.zeros_like(limit)
        if BOUNDED:
            sinks = tl.minimum(num_sink_tokens, limit)
            unseen = tl.maximum(limit - max_separators - sinks, 0)
            begin = sinks + unseen
        token = first + offset
        tl.store(stream_ranges + 2 * token, begin, mask=valid)
        tl.store(stream_ranges + 2 * token + 1, limit, mask=valid)
        if shifts is not None:
            shift = window_first - limit
            tl.store(shifts + token, tl.where(kept, position - entry, 0), mask=valid)
            tl.store(shifts + num_tokens + token, shift, mask=valid)
            tl.store(shifts + 2 * num_tokens + token, shift + unseen, mask=valid)


def kept_metadata(
    token_ids: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    kept_table: torch.Tensor,
    is_chosen: torch.Tensor,
    kept_prefix: torch.Tensor,
    stream_slots: torch.Tensor,
    stream_ranges: torch.Tensor,
    *,
    num_sink_tokens: int,
    window_size: int,
    page_size: int,
    interval: int = 0,
    max_separator_tokens: int | None = None,
    shifts: torch.Tensor | None = None,
) -> None:
    """Count a step's kept tokens, and find where they go and what each token sees of the stream.

    Arguments as :func:`kept_metadata_reference`, ``shifts`` contiguous. Nothing is waited for on
    the host.
    """
    num_reqs = seq_lens.shape[0]
    _kept_metadata[(num_reqs + 1,)](
        token_ids,
        query_start,
        seq_lens,
        rows,
        kept_table,
        is_chosen,
        kept_prefix,
        stream_slots,
        stream_ranges,
        shifts,
        num_reqs,
        stream_slots.shape[0],
        kept_prefix.shape[1],
        kept_table.stride(0),
        is_chosen.shape[0],
        num_sink_tokens,
        window_size,
        interval,
        max_separator_tokens or 0,
        PAGE=page_size,
        TILE=TILE,
        BOUNDED=max_separator_tokens is not None,
    )
