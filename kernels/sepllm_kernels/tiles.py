"""Attention of a block of rows to tiles of entries, shared by decode and prefill.

A *row* is one query token of one head; rows of the heads that share keys are packed, so a tile is
loaded once for all of them. Softmax runs over all tiles with a running maximum (FlashAttention,
arXiv 2205.14135, algorithm 1), in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    # The usual form loses all digits where x is small; there the series has them.
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.2, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def attend_tiles(
    acc,
    weight_sum,
    maximum,
    query,
    key_pages,
    value_pages,
    page_stride,
    entry_stride,
    table,  # page of each PAGE entries
    row_low,
    row_high,  # entries [low, high) are visible to a row
    low,
    high,  # entries that any row sees
    first_tile,
    stop_tile,
    scale,
    SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Take tiles ``[first_tile, stop_tile)`` into the running softmax."""
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    is_element = dim[None, :] < HEAD_SIZE
    for tile in range(first_tile, stop_tile):
        entry = tile * TILE + tl.arange(0, TILE)
        present = (entry >= low) & (entry < high)
        page = tl.load(table + entry // PAGE, mask=present, other=0).to(tl.int64)
        at = (page * page_stride + entry % PAGE * entry_stride)[:, None] + dim[None, :]
        loaded = present[:, None] & is_element  # pages hold anything where nothing was written
        key = tl.load(key_pages + at, mask=loaded, other=0.0).to(query.dtype)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFT_CAP > 0:
            logits = SOFT_CAP * _tanh(logits / SOFT_CAP)
        visible = (entry[None, :] >= row_low[:, None]) & (entry[None, :] < row_high[:, None])
        logits = tl.where(visible, logits * LOG2_E, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(maximum - base)
        value = tl.load(value_pages + at, mask=loaded, other=0.0).to(query.dtype)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(query.dtype), value, input_precision="ieee")
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        maximum = new_maximum
    return acc, weight_sum, maximum


@triton.jit
def load_rows(query, token_stride, token, head, row_valid, HEAD_SIZE: tl.constexpr):
    """Queries of packed rows, ``[ROWS, head size rounded up]``."""
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    at = (token.to(tl.int64) * token_stride + head * HEAD_SIZE)[:, None] + dim[None, :]
    return tl.load(query + at, mask=row_valid[:, None] & (dim[None, :] < HEAD_SIZE), other=0.0)


@triton.jit
def attend_span(
    queries,  # window, stream and sink queries, part_stride apart
    part_stride,
    token_stride,
    token,
    head,
    row_valid,
    position,  # of each row
    key_pages,
    value_pages,
    page_stride,
    entry_stride,
    window_table,
    kept_table,
    stream_ranges,
    window_size,
    num_sinks,
    split,
    num_splits,
    scale,
    SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One split's share of all tiles that packed rows of one request see.

    Tiles are numbered through: those of the sinks (with a bound on separators), then the stream's,
    then the window's. At least one row is valid, and positions of valid rows never decrease.
    """
    far: tl.constexpr = 2**30
    limit = tl.load(stream_ranges + 2 * token + 1, mask=row_valid, other=0)
    begin = tl.load(stream_ranges + 2 * token, mask=row_valid, other=far)
    stream_low, stream_high = tl.min(begin, 0), tl.max(limit, 0)
    sinks = tl.minimum(limit, num_sinks)
    sink_high = tl.minimum(stream_high, num_sinks)
    window_begin = tl.maximum(position - window_size + 1, 0)
    window_low = tl.min(tl.where(row_valid, window_begin, far), 0)
    window_high = tl.max(tl.where(row_valid, position, 0), 0) + 1

    sink_tiles = tl.cdiv(sink_high, TILE)
    first_stream = stream_low // TILE
    stream_tiles = tl.maximum(tl.cdiv(stream_high, TILE) - first_stream, 0)
    first_window = window_low // TILE
    window_tiles = tl.where(window_size > 0, tl.cdiv(window_high, TILE) - first_window, 0)
    share = tl.cdiv(sink_tiles + stream_tiles + window_tiles, num_splits)
    start, stop = split * share, (split + 1) * share

    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    acc = tl.zeros_like(position)[:, None].to(tl.float32) + tl.zeros_like(dim)[None, :]
    weight_sum = tl.zeros_like(position).to(tl.float32)
    maximum = weight_sum + float("-inf")
    if (num_sinks > 0) & (start < sink_tiles):
        acc, weight_sum, maximum = attend_tiles(
            acc,
            weight_sum,
            maximum,
            load_rows(queries + 2 * part_stride, token_stride, token, head, row_valid, HEAD_SIZE),
            key_pages,
            value_pages,
            page_stride,
            entry_stride,
            kept_table,
            tl.zeros_like(sinks),
            sinks,
            0,
            sink_high,
            start,
            tl.minimum(stop, sink_tiles),
            scale,
            SOFT_CAP,
            HEAD_SIZE,
            PAGE,
            TILE,
        )
    start, stop = start - sink_tiles, stop - sink_tiles
    if (start < stream_tiles) & (stop > 0):
        acc, weight_sum, maximum = attend_tiles(
            acc,
            weight_sum,
            maximum,
            load_rows(queries + part_stride, token_stride, token, head, row_valid, HEAD_SIZE),
            key_pages,
            value_pages,
            page_stride,
            entry_stride,
            kept_table,
            begin,
            limit,
            stream_low,
            stream_high,
            first_stream + tl.maximum(start, 0),
            first_stream + tl.minimum(stop, stream_tiles),
            scale,
            SOFT_CAP,
            HEAD_SIZE,
            PAGE,
            TILE,
        )
    start, stop = start - stream_tiles, stop - stream_tiles
    if (start < window_tiles) & (stop > 0):
        acc, weight_sum, maximum = attend_tiles(
            acc,
            weight_sum,
            maximum,
            load_rows(queries, token_stride, token, head, row_valid, HEAD_SIZE),
            key_pages,
            value_pages,
            page_stride,
            entry_stride,
            window_table,
            window_begin,
            tl.where(row_valid, position + 1, 0),
            window_low,
            window_high,
            first_window + tl.maximum(start, 0),
            first_window + tl.minimum(stop, window_tiles),
            scale,
            SOFT_CAP,
            HEAD_SIZE,
            PAGE,
            TILE,
        )
    return acc, weight_sum, maximum
