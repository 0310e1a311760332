"""Attention of a block of rows to tiles of entries, shared by decode and prefill.

A *row* is one query token of one head; rows of the heads that share keys are packed, so a tile is
loaded once for all of them. Softmax runs over all tiles with a running maximum (FlashAttention,
arXiv 2205.14135, algorithm 1), in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Of the loop over tiles. Table entries are loaded an iteration before what they point to, which the
# compiler counts, so that with five there is room for two tiles of keys and values.
STAGES = 5


def tile_entries(head_size: int, element_size: int) -> int:
    """Entries of a tile: its keys, as its values, take 16 KiB of shared memory at most."""
    entry_bytes = triton.next_power_of_2(head_size) * element_size
    return int(max(16, min(64, 16384 // entry_bytes)))


@triton.jit
def _tanh(x, ACCURATE: tl.constexpr):
    tanh = 1 - 2 / (tl.exp(2 * x) + 1)
    if ACCURATE:  # which has an absolute error of 1e-7; where x is small, the series has all digits
        square = x * x
        series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        tanh = tl.where(tl.abs(x) < 0.2, series, tanh)
    return tanh


@triton.jit
def load_rows(
    query,
    token_stride,
    token,
    head,
    row_valid,
    scale,
    HEAD_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Queries of packed rows, ``[ROWS, head size rounded up]``, and what their logits are
    multiplied by.

    FP8 keys widen to float16 in one instruction and to bfloat16 in several, so bfloat16 queries
    become float16 beside them. Each row is divided by a power of two, after which its largest
    element is between 1 and 2 and none leaves float16's range.
    """
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    at = (token.to(tl.int64) * token_stride + head * HEAD_SIZE)[:, None] + dim[None, :]
    rows = tl.load(query + at, mask=row_valid[:, None] & (dim[None, :] < HEAD_SIZE), other=0.0)
    power = tl.zeros_like(token).to(tl.float32) + 1
    if (rows.dtype == tl.bfloat16) & (KEYS.primitive_bitwidth == 8):
        largest = tl.max(tl.abs(rows.to(tl.float32)), 1)
        exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.where(exponent == 0, 1.0, exponent.to(tl.float32, bitcast=True))
        rows = (rows.to(tl.float32) / power[:, None]).to(tl.float16)
    return rows, power * scale


@triton.jit
def attend_tiles(
    acc,
    acc_odd,  # of odd dimensions, where PAIRED
    weight_sum,
    maximum,
    queries,
    token_stride,
    token,
    head,
    row_valid,
    scale,
    key_pages,
    value_pages,
    page_stride,
    entry_stride,
    table,  # page of each PAGE entries
    row_low,
    row_high,  # entries [low, high) are visible to a row
    low,
    high,  # entries that any row sees
    full_low,
    full_high,  # entries that all rows see
    first_tile,
    stop_tile,
    SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Take tiles ``[first_tile, stop_tile)`` into the running softmax.

    With ``PAIRED``, values are read as pairs of bytes: the hardware transposes matrices of 16-bit
    elements while it reads them from shared memory, and of bytes one by one.
    """
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    is_element = dim[None, :] < HEAD_SIZE
    query, scale = load_rows(
        queries, token_stride, token, head, row_valid, scale, HEAD_SIZE, key_pages.dtype.element_ty
    )
    factor = (tl.zeros_like(scale) + 1 if SOFT_CAP > 0 else scale) * LOG2_E
    in_tile = tl.arange(0, TILE)
    in_page = in_tile % PAGE * entry_stride
    for tile in range(first_tile, stop_tile):
        entry = tile * TILE + in_tile
        present = (entry >= low) & (entry < high)
        if PAGE < TILE:
            pages = table + tile * (TILE // PAGE) + in_tile // PAGE
            at = tl.load(pages, mask=present, other=0).to(tl.int64) * page_stride + in_page
        else:
            page = tl.load(table + tile // (PAGE // TILE)).to(tl.int64)
            at = page * page_stride + tile % (PAGE // TILE) * TILE * entry_stride + in_page
        loaded = present[:, None] & is_element  # pages hold anything where nothing was written
        key = tl.load(key_pages + (at[:, None] + dim[None, :]), mask=loaded, other=0.0)
        logits = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        if SOFT_CAP > 0:
            accurate: tl.constexpr = query.dtype == tl.float32
            logits = SOFT_CAP * _tanh(logits * (scale / SOFT_CAP)[:, None], accurate)
        if (tile * TILE < full_low) | (tile * TILE + TILE > full_high):
            visible = (entry[None, :] >= row_low[:, None]) & (entry[None, :] < row_high[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1) * factor)
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(logits * factor[:, None] - base[:, None])
        shrink = tl.exp2(maximum - base)
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        weights = weights.to(query.dtype)
        acc = acc * shrink[:, None]
        if PAIRED:
            pair = tl.arange(0, triton.next_power_of_2(HEAD_SIZE) // 2)
            words = value_pages.to(tl.pointer_type(tl.uint16)) + (at // 2)[:, None] + pair[None, :]
            is_pair = present[:, None] & (pair[None, :] < HEAD_SIZE // 2)
            word = tl.load(words, mask=is_pair, other=0)
            element: tl.constexpr = value_pages.dtype.element_ty
            even = (word & 255).to(tl.uint8).to(element, bitcast=True).to(query.dtype)
            odd = (word >> 8).to(tl.uint8).to(element, bitcast=True).to(query.dtype)
            acc += tl.dot(weights, even, input_precision="ieee")
            acc_odd = acc_odd * shrink[:, None] + tl.dot(weights, odd, input_precision="ieee")
        else:
            value = tl.load(value_pages + (at[:, None] + dim[None, :]), mask=loaded, other=0.0)
            acc += tl.dot(weights, value.to(query.dtype), input_precision="ieee")
        maximum = new_maximum
    return acc, acc_odd, weight_sum, maximum


@triton.jit
def count_tiles(
    stream_low,
    stream_high,  # stream entries that tokens see
    first_position,
    last_position,
    window_size,
    num_sinks,
    TILE: tl.constexpr,
):
    """Tiles of the sinks (with a bound on separators), the stream's first and how many, and the
    window's, of successive tokens of a request."""
    sinks = tl.cdiv(tl.minimum(stream_high, num_sinks), TILE)
    first_stream = stream_low // TILE
    stream = tl.maximum(tl.cdiv(stream_high, TILE) - first_stream, 0)
    first_window = tl.maximum(first_position - window_size + 1, 0) // TILE
    window = tl.where(window_size > 0, last_position // TILE + 1 - first_window, 0)
    return sinks, first_stream, stream, first_window, window


@triton.jit
def attend_span(
    queries,  # window, stream and sink queries, part_stride apart
    part_stride,
    token_stride,
    token,
    head,
    row_valid,
    position,  # of each row
    first_token,
    last_token,  # of the valid rows
    last_position,
    key_pages,
    value_pages,
    page_stride,
    entry_stride,
    window_table,
    kept_table,
    stream_ranges,
    window_size,
    num_sinks,
    start,
    stop,
    scale,
    SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PAIRED: tl.constexpr = False,
):
    """Tiles ``[start, stop)`` of all that packed rows of one request see.

    They are numbered through: those of the sinks (with a bound on separators), then the stream's,
    then the window's. Valid rows are of successive tokens, which see nothing that begins or ends
    before what those before them see.
    """
    begin = tl.load(stream_ranges + 2 * token, mask=row_valid, other=0)
    limit = tl.load(stream_ranges + 2 * token + 1, mask=row_valid, other=0)
    stream_low = tl.load(stream_ranges + 2 * first_token)
    first_limit = tl.load(stream_ranges + 2 * first_token + 1)
    last_begin = tl.load(stream_ranges + 2 * last_token)
    stream_high = tl.load(stream_ranges + 2 * last_token + 1)
    sink_high = tl.minimum(stream_high, num_sinks)
    first_position = last_position - (last_token - first_token)
    sink_tiles, first_stream, stream_tiles, first_window, window_tiles = count_tiles(
        stream_low, stream_high, first_position, last_position, window_size, num_sinks, TILE
    )
    size: tl.constexpr = triton.next_power_of_2(HEAD_SIZE)
    dim = tl.arange(0, size // 2 if PAIRED else size)
    weight_sum = tl.zeros_like(position).to(tl.float32)
    acc = weight_sum[:, None] + tl.zeros_like(dim)[None, :]
    acc_odd = acc if PAIRED else weight_sum
    maximum = weight_sum + float("-inf")
    if (num_sinks > 0) & (start < sink_tiles):
        acc, acc_odd, weight_sum, maximum = attend_tiles(
            acc,
            acc_odd,
            weight_sum,
            maximum,
            queries + part_stride + part_stride,  # twice as much may not fit 32 bits
            token_stride,
            token,
            head,
            row_valid,
            scale,
            key_pages,
            value_pages,
            page_stride,
            entry_stride,
            kept_table,
            tl.zeros_like(limit),
            tl.minimum(limit, num_sinks),
            0,
            sink_high,
            0,
            tl.minimum(first_limit, num_sinks),
            start,
            tl.minimum(stop, sink_tiles),
            SOFT_CAP,
            HEAD_SIZE,
            PAGE,
            TILE,
            PAIRED,
        )
    start, stop = start - sink_tiles, stop - sink_tiles
    if (start < stream_tiles) & (stop > 0):
        acc, acc_odd, weight_sum, maximum = attend_tiles(
            acc,
            acc_odd,
            weight_sum,
            maximum,
            queries + part_stride,
            token_stride,
            token,
            head,
            row_valid,
            scale,
            key_pages,
            value_pages,
            page_stride,
            entry_stride,
            kept_table,
            begin,
            limit,
            stream_low,
            stream_high,
            last_begin,
            first_limit,
            first_stream + tl.maximum(start, 0),
            first_stream + tl.minimum(stop, stream_tiles),
            SOFT_CAP,
            HEAD_SIZE,
            PAGE,
            TILE,
            PAIRED,
        )
    start, stop = start - stream_tiles, stop - stream_tiles
    if (start < window_tiles) & (stop > 0):
        acc, acc_odd, weight_sum, maximum = attend_tiles(
            acc,
            acc_odd,
            weight_sum,
            maximum,
            queries,
            token_stride,
            token,
            head,
            row_valid,
            scale,
            key_pages,
            value_pages,
            page_stride,
            entry_stride,
            window_table,
            tl.maximum(position - window_size + 1, 0),
            tl.where(row_valid, position + 1, 0),
            tl.maximum(first_position - window_size + 1, 0),
            last_position + 1,
            tl.maximum(last_position - window_size + 1, 0),
            first_position + 1,
            first_window + tl.maximum(start, 0),
            first_window + tl.minimum(stop, window_tiles),
            SOFT_CAP,
            HEAD_SIZE,
            PAGE,
            TILE,
            PAIRED,
        )
    if PAIRED:
        acc = tl.join(acc, acc_odd).reshape(acc.shape[0], size)
    return acc, weight_sum, maximum
