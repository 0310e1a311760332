"""The backward kernels of ``packed_attention`` (FlashAttention-2, algorithm 2).

A program of the one for queries goes over tiles, as the forward kernel does. A program of the one
for keys and values has a tile, of the stream or of the text, and goes over the tokens that see any
of it, which are one run too. No sum is taken by several programs: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sepllm_kernels.sequence.packed.kernels import (
    SIZES,
    block_range,
    load_rows,
    store_rows,
    visible,
)


@triton.jit
def _query_gradient(
    acc,
    query,
    grad,
    log_sum,
    delta,
    keys,
    values,
    entry_stride,
    row_low,
    row_high,
    low,
    high,
    full_low,
    full_high,
    factor,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add what entries ``[low, high)`` give to the gradient of the rows, but for the scale."""
    for start in range(low, high, TILE):
        entry = start + tl.arange(0, TILE)
        key = load_rows(keys, entry_stride, entry, entry < high, HEAD_SIZE)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        if (start < full_low) | (start + TILE > full_high):
            logits = tl.where(visible(row_low, row_high, entry), logits, float("-inf"))
        weights = tl.exp2(logits - log_sum[:, None])
        value = load_rows(values, entry_stride, entry, entry < high, HEAD_SIZE)
        products = tl.dot(grad, tl.trans(value), input_precision="ieee")
        change = weights * (products - delta[:, None])
        acc += tl.dot(change.to(key.dtype), key, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=SIZES)
def _packed_query_gradient(
    queries,
    keys,
    values,
    kept_keys,
    kept_values,
    grads,
    log_sums,
    deltas,
    query_grads,
    window_first,
    stream,
    sinks,
    num_tokens,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    factor,
    scale,
    GROUP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = block * ROWS
    last = tl.minimum(first + ROWS, num_tokens) - 1
    token = first + tl.arange(0, ROWS)
    present = token < num_tokens
    kv_head = head // GROUP
    keys += kv_head * key_head_stride
    values += kv_head * key_head_stride
    kept_stride: tl.constexpr = NUM_HEADS // GROUP * HEAD_SIZE
    kept_keys += kv_head * HEAD_SIZE
    kept_values += kv_head * HEAD_SIZE
    query = load_rows(queries + head * query_head_stride, query_stride, token, present, HEAD_SIZE)
    row_stride: tl.constexpr = NUM_HEADS * HEAD_SIZE
    grad = load_rows(grads + head * HEAD_SIZE, row_stride, token, present, HEAD_SIZE)
    at = token.to(tl.int64) * NUM_HEADS + head
    log_sum = tl.load(log_sums + at, mask=present, other=0.0)
    delta = tl.load(deltas + at, mask=present, other=0.0)
    acc = tl.zeros([ROWS, triton.next_power_of_2(HEAD_SIZE)], tl.float32)
    if sinks is not None:
        row_low, row_high, low, high, full_low, full_high = block_range(
            sinks, num_tokens, token, present, first, last
        )
        acc = _query_gradient(
            acc, query, grad, log_sum, delta, kept_keys, kept_values, kept_stride,
            row_low, row_high, low, high, full_low, full_high, factor, HEAD_SIZE, TILE,
        )  # fmt: skip
    row_low, row_high, low, high, full_low, full_high = block_range(
        stream, num_tokens, token, present, first, last
    )
    acc = _query_gradient(
        acc, query, grad, log_sum, delta, kept_keys, kept_values, kept_stride,
        row_low, row_high, low, high, full_low, full_high, factor, HEAD_SIZE, TILE,
    )  # fmt: skip
    row_low = tl.load(window_first + token, mask=present, other=0)
    low, full_low = tl.load(window_first + first), tl.load(window_first + last)
    acc = _query_gradient(
        acc, query, grad, log_sum, delta, keys, values, key_stride,
        row_low, token + 1, low, last + 1, full_low, first + 1, factor, HEAD_SIZE, TILE,
    )  # fmt: skip
    found = query_grads + head * HEAD_SIZE
    store_rows(found, row_stride, token, present, acc * scale, HEAD_SIZE)


@triton.jit
def _tile_gradients(
    key_acc,
    value_acc,
    key,
    value,
    entry,
    queries,
    query_stride,
    grads,
    log_sums,
    deltas,
    lows,
    highs,  # of each token; None: of the window, whose last place is the token's own
    seen,  # of each entry
    num_entries,
    first,
    last,  # entries of the tile
    factor,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add what the tokens of one head give to the gradients of a tile, keys' but for the scale."""
    # Those that see any of the tile, and those that see all of it.
    first_token, full_first = tl.load(seen + first), tl.load(seen + last)
    full_stop, stop_token = tl.load(seen + num_entries + first), tl.load(seen + num_entries + last)
    for start in range(first_token, stop_token, ROWS):
        token = start + tl.arange(0, ROWS)
        present = token < stop_token
        query = load_rows(queries, query_stride, token, present, HEAD_SIZE)
        grad = load_rows(grads, NUM_HEADS * HEAD_SIZE, token, present, HEAD_SIZE)
        at = token.to(tl.int64) * NUM_HEADS
        log_sum = tl.load(log_sums + at, mask=present, other=0.0)
        delta = tl.load(deltas + at, mask=present, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        if (start < full_first) | (start + ROWS > full_stop):
            low = tl.load(lows + token, mask=present, other=0)
            if highs is None:
                high = tl.where(present, token + 1, 0)
            else:
                high = tl.load(highs + token, mask=present, other=0)
            logits = tl.where(visible(low, high, entry), logits, float("-inf"))
        weights = tl.exp2(logits - log_sum[:, None])
        value_acc += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
        products = tl.dot(grad, tl.trans(value), input_precision="ieee")
        change = weights * (products - delta[:, None])
        key_acc += tl.dot(tl.trans(change.to(query.dtype)), query, input_precision="ieee")
    return key_acc, value_acc


@triton.jit(do_not_specialize=SIZES)
def _packed_key_gradient(
    queries,
    keys,  # of the stream, or of all tokens
    values,
    grads,
    log_sums,
    deltas,
    key_grads,
    value_grads,
    stream_key_grads,  # of the window's pass: what the stream's has found; None: nothing
    stream_value_grads,
    stream_entry,  # of each token, -1 where it is not kept
    ranges,  # of the stream; of all tokens: first places of windows
    seen,  # [2, num_entries]: the run of tokens that see each entry
    sink_ranges,  # or None
    sink_seen,
    num_tokens,
    num_entries,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    factor,
    scale,
    IS_STREAM: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0) * TILE  # the first are seen by most, and begin
    last = tl.minimum(first + TILE, num_entries) - 1
    kv_head = tl.program_id(1).to(tl.int64)
    entry = first + tl.arange(0, TILE)
    present = entry < num_entries
    key = load_rows(keys + kv_head * key_head_stride, key_stride, entry, present, HEAD_SIZE)
    value = load_rows(values + kv_head * key_head_stride, key_stride, entry, present, HEAD_SIZE)
    size: tl.constexpr = triton.next_power_of_2(HEAD_SIZE)
    key_acc = tl.zeros([TILE, size], tl.float32)
    value_acc = tl.zeros([TILE, size], tl.float32)
    for shared in range(GROUP):
        head = kv_head * GROUP + shared
        own_queries, own_grads = queries + head * query_head_stride, grads + head * HEAD_SIZE
        if IS_STREAM:  # noqa: SIM108 - the compiler knows which, and has no pointer of the other
            highs = ranges + num_tokens
        else:
            highs = None
        key_acc, value_acc = _tile_gradients(
            key_acc, value_acc, key, value, entry, own_queries, query_stride, own_grads,
            log_sums + head, deltas + head, ranges, highs, seen, num_entries, first, last,
            factor, NUM_HEADS, HEAD_SIZE, ROWS,
        )  # fmt: skip
        if sink_ranges is not None:
            key_acc, value_acc = _tile_gradients(
                key_acc, value_acc, key, value, entry, own_queries, query_stride, own_grads,
                log_sums + head, deltas + head, sink_ranges, sink_ranges + num_tokens,
                sink_seen, num_entries, first, last, factor, NUM_HEADS, HEAD_SIZE, ROWS,
            )  # fmt: skip
    row_stride: tl.constexpr = NUM_HEADS // GROUP * HEAD_SIZE
    at = kv_head * HEAD_SIZE
    key_acc *= scale
    if stream_entry is not None:
        other = tl.load(stream_entry + entry, mask=present, other=-1)
        kept = other >= 0
        key_acc += load_rows(stream_key_grads + at, row_stride, other, kept, HEAD_SIZE)
        value_acc += load_rows(stream_value_grads + at, row_stride, other, kept, HEAD_SIZE)
    store_rows(key_grads + at, row_stride, entry, present, key_acc, HEAD_SIZE)
    store_rows(value_grads + at, row_stride, entry, present, value_acc, HEAD_SIZE)


@triton.jit(do_not_specialize=SIZES)
def _packed_deltas(
    outputs,
    grads,
    deltas,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Products of result and gradient, of each token and head; ROWS of them in a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < num_tokens.to(tl.int64) * NUM_HEADS
    result = load_rows(outputs, HEAD_SIZE, row, present, HEAD_SIZE).to(tl.float32)
    grad = load_rows(grads, HEAD_SIZE, row, present, HEAD_SIZE).to(tl.float32)
    tl.store(deltas + row, tl.sum(result * grad, 1), mask=present)
