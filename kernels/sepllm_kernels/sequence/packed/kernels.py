"""The forward kernel of ``packed_attention``, over ``[kept stream | band]``, and what all share.

FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) over keys that do not all lie side by side.
A program has a block of tokens of one head, and goes over the tiles of the stream and of the text
that any of them sees. Ends of what is seen never decrease, so they are one run, and tiles that
nobody sees are never met.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("num_tokens", "num_entries")  # change from step to step: no kernel is compiled for them


@triton.jit
def load_rows(pointer, token_stride, token, present, HEAD_SIZE: tl.constexpr):
    """``[tokens, head size rounded up]`` of one head; elements of a head follow each other."""
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    at = token.to(tl.int64)[:, None] * token_stride + dim[None, :]
    return tl.load(pointer + at, mask=present[:, None] & (dim[None, :] < HEAD_SIZE), other=0.0)


@triton.jit
def store_rows(pointer, token_stride, token, present, value, HEAD_SIZE: tl.constexpr):
    """What :func:`load_rows` reads."""
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    at = token.to(tl.int64)[:, None] * token_stride + dim[None, :]
    kept = present[:, None] & (dim[None, :] < HEAD_SIZE)
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=kept)


@triton.jit
def visible(row_low, row_high, entry):
    """``[rows, entries]``: which entries rows see."""
    return (entry[None, :] >= row_low[:, None]) & (entry[None, :] < row_high[:, None])


@triton.jit
def _attend(
    acc,
    weight_sum,
    maximum,
    query,
    keys,
    values,
    entry_stride,
    row_low,
    row_high,  # entries [low, high) are seen by a row
    low,
    high,  # by any row
    full_low,
    full_high,  # by every row
    factor,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Take entries ``[low, high)`` into the running softmax."""
    for start in range(low, high, TILE):
        entry = start + tl.arange(0, TILE)
        key = load_rows(keys, entry_stride, entry, entry < high, HEAD_SIZE)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        if (start < full_low) | (start + TILE > full_high):
            logits = tl.where(visible(row_low, row_high, entry), logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(maximum - base)
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        value = load_rows(values, entry_stride, entry, entry < high, HEAD_SIZE)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        maximum = new_maximum
    return acc, weight_sum, maximum


@triton.jit
def block_range(ranges, num_tokens, token, present, first, last):
    """Of a range of the stream: each row's, any row's and every row's entries."""
    row_low = tl.load(ranges + token, mask=present, other=0)
    row_high = tl.load(ranges + num_tokens + token, mask=present, other=0)
    low, full_low = tl.load(ranges + first), tl.load(ranges + last)
    full_high, high = tl.load(ranges + num_tokens + first), tl.load(ranges + num_tokens + last)
    return row_low, row_high, low, high, full_low, full_high


@triton.jit(do_not_specialize=SIZES)
def _packed_forward(
    queries,
    keys,
    values,
    kept_keys,
    kept_values,
    output,
    log_sums,
    window_first,
    stream,
    sinks,  # or None
    num_tokens,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    factor,
    GROUP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last see most, and begin
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
    acc = tl.zeros([ROWS, triton.next_power_of_2(HEAD_SIZE)], tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    if sinks is not None:
        row_low, row_high, low, high, full_low, full_high = block_range(
            sinks, num_tokens, token, present, first, last
        )
        acc, weight_sum, maximum = _attend(
            acc, weight_sum, maximum, query, kept_keys, kept_values, kept_stride,
            row_low, row_high, low, high, full_low, full_high, factor, HEAD_SIZE, TILE,
        )  # fmt: skip
    row_low, row_high, low, high, full_low, full_high = block_range(
        stream, num_tokens, token, present, first, last
    )
    acc, weight_sum, maximum = _attend(
        acc, weight_sum, maximum, query, kept_keys, kept_values, kept_stride,
        row_low, row_high, low, high, full_low, full_high, factor, HEAD_SIZE, TILE,
    )  # fmt: skip
    row_low = tl.load(window_first + token, mask=present, other=0)
    low, full_low = tl.load(window_first + first), tl.load(window_first + last)
    acc, weight_sum, maximum = _attend(
        acc, weight_sum, maximum, query, keys, values, key_stride,
        row_low, token + 1, low, last + 1, full_low, first + 1, factor, HEAD_SIZE, TILE,
    )  # fmt: skip
    some = tl.where(present, weight_sum, 1.0)
    out = output + head * HEAD_SIZE
    store_rows(out, NUM_HEADS * HEAD_SIZE, token, present, acc / some[:, None], HEAD_SIZE)
    at = token.to(tl.int64) * NUM_HEADS + head
    tl.store(log_sums + at, maximum + tl.log2(some), mask=present)
