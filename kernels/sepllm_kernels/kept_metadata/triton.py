"""``kept_metadata`` in Triton: one launch per step, a program per request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import STEP_SIZES

TILE = 512  # tokens looked at at once


# In a tile, the places of one segment are told from those of the next by so much: a span reaches at
# most 63 places behind the last token of a tile.
SEGMENT = TILE + 64


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _count_tokens(
    token_ids,
    token_codes,
    prefix,  # the request's row
    span_left,  # its row too, or none
    ring,
    first,
    num_tokens,
    start,
    vocab_size,
    num_sink_tokens,
    interval,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Write ``kept_prefix`` behind each token, and what a span has left there."""
    below = tl.load(prefix + start % ring)
    left = tl.zeros_like(below)
    if span_left is not None:
        left = tl.load(span_left + start % ring).to(tl.int32)
    for done in range(0, num_tokens, TILE):
        place = tl.arange(0, TILE)
        offset = done + place
        valid = offset < num_tokens
        position = start + offset
        token_id = tl.load(token_ids + first + offset, mask=valid, other=-1)
        known = valid & (token_id >= 0) & (token_id < vocab_size)
        code = tl.load(token_codes + token_id, mask=known, other=0).to(tl.int32)
        kept = ((code & 1) != 0) | (position < num_sink_tokens)
        if interval > 0:
            kept = kept | (position % interval == 0)
        if span_left is not None:
            # Up to where each token's span reaches, and the furthest of all up to it. A segment's
            # places are beyond all those that spans of earlier ones reach.
            is_end = code >> 7
            segment = (tl.cumsum(is_end, 0) - is_end) * SEGMENT
            after = (code >> 1) & 63
            starts = (after > 0) & (is_end == 0)
            reach = tl.maximum(tl.where(starts, segment + place + 1 + after, 0), left)
            furthest = tl.associative_scan(reach, 0, _larger)
            # Who keeps others is kept itself, so that the token's own span may count here.
            kept = kept | (furthest > segment + place)
            behind = furthest - (segment + is_end * SEGMENT + place + 1)
            behind = tl.maximum(behind, 0)
            tl.store(span_left + (position + 1) % ring, behind.to(tl.uint8), mask=valid)
            last = tl.minimum(done + TILE, num_tokens) - 1
            left = tl.sum(tl.where(offset == last, behind, 0), 0)
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
    token_codes,
    kept_prefix,
    span_left,
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
    SEGMENT: tl.constexpr,
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
    row = tl.load(rows + req).to(tl.int64) * ring
    prefix = kept_prefix + row
    left = span_left
    if span_left is not None:
        left = span_left + row
    table = kept_table + req.to(tl.int64) * table_stride
    _count_tokens(
        token_ids,
        token_codes,
        prefix,
        left,
        ring,
        first,
        length,
        start,
        vocab_size,
        num_sink_tokens,
        interval,
        TILE,
        SEGMENT,
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
    token_codes: torch.Tensor,
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
    span_left: torch.Tensor | None = None,
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
        token_codes,
        kept_prefix,
        span_left,
        stream_slots,
        stream_ranges,
        shifts,
        num_reqs,
        stream_slots.shape[0],
        kept_prefix.shape[1],
        kept_table.stride(0),
        token_codes.shape[0],
        num_sink_tokens,
        window_size,
        interval,
        max_separator_tokens or 0,
        PAGE=page_size,
        TILE=TILE,
        SEGMENT=SEGMENT,
        BOUNDED=max_separator_tokens is not None,
    )
