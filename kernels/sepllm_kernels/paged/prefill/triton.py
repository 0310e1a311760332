"""``kept_prefill_paged`` in Triton: chunks of prompts, a program per block of tokens and KV head.

A block reads the stream up to its last token's limit (a staircase inside the block) and the window
from its first token's to its last token's position; tiles that no token of it sees are skipped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import STEP_INDEX, STEP_SIZES, KeptBatch, PagedKV
from sepllm_kernels.paged.arguments import batch_arguments
from sepllm_kernels.paged.launches import Launch, launch_first_that_fits
from sepllm_kernels.paged.tiles import LOG2_E, STAGES, attend_span, tile_entries

# Rows are query tokens times heads per KV head. With 4 warps for 128, registers spill; stages are
# those of decode.
LAUNCHES = (
    Launch(128, 8, STAGES),
    Launch(64, 4, STAGES),
    Launch(64, 4, STAGES - 1),
    Launch(32, 4, STAGES - 1),
)


@triton.jit
def _find_request(query_start, block, num_reqs, BLOCK: tl.constexpr):
    """Request of a block; each request begins a block of its own, so the first block of request
    ``i`` is no later than ``query_start[i] // BLOCK + i``."""
    low = block * 0  # a tensor, as what it becomes in the loop
    high = low + num_reqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_INDEX)
def _prefill(
    queries,
    key_pages,
    value_pages,
    output,
    log_sums,  # [num_tokens, num_heads], or None
    num_reqs,
    query_start,
    seq_lens,
    window_table,
    kept_table,
    stream_ranges,
    part_stride,
    token_stride,
    page_stride,
    head_stride,
    entry_stride,
    window_table_stride,
    kept_table_stride,
    window_size,
    num_sinks,
    scale,
    value_scale,
    SOFT_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    head_start = kv_head.to(tl.int64) * head_stride
    base = tl.load(query_start)  # of the batch's tokens, the first that is prefilled
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last see most, and begin
    req = _find_request(query_start, block + base // BLOCK, num_reqs, BLOCK).to(tl.int64)
    first = tl.load(query_start + req)
    num_tokens = tl.load(query_start + req + 1) - first
    done = (block + base // BLOCK - (first // BLOCK + req).to(tl.int32)) * BLOCK
    if done >= num_tokens:
        return
    row = tl.arange(0, ROWS)
    offset = done + row // GROUP
    token, head = first + offset, kv_head * GROUP + row % GROUP
    row_valid = (row < BLOCK * GROUP) & (offset < num_tokens)
    position = tl.load(seq_lens + req) - num_tokens  # of the chunk's first token
    last = tl.minimum(done + BLOCK, num_tokens) - 1
    acc, weight_sum, maximum = attend_span(
        queries,
        part_stride,
        token_stride,
        token,
        head,
        row_valid,
        position + offset,
        first + done,
        first + last,
        position + last,
        key_pages + head_start,
        value_pages + head_start,
        page_stride,
        entry_stride,
        window_table + req * window_table_stride,
        kept_table + req * kept_table_stride,
        stream_ranges,
        window_size,
        num_sinks,
        0,
        2**30,
        scale,
        SOFT_CAP,
        HEAD_SIZE,
        PAGE,
        TILE,
    )
    some = tl.where(weight_sum == 0, 1.0, weight_sum)  # without a window, a token may see nothing
    result = acc / some[:, None] * value_scale
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    out = token.to(tl.int64) * NUM_HEADS + head
    at = out[:, None] * HEAD_SIZE + dim[None, :]
    stored = row_valid[:, None] & (dim[None, :] < HEAD_SIZE)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=stored)
    if log_sums is not None:
        log_sum = tl.where(weight_sum == 0, float("-inf"), (maximum + tl.log2(some)) / LOG2_E)
        tl.store(log_sums + out, log_sum, mask=row_valid)


def kept_prefill_paged(
    queries: torch.Tensor,
    pages: PagedKV,
    batch: KeptBatch,
    output: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    log_sums: torch.Tensor | None = None,
) -> None:
    """Attend any number of tokens of each request to what they see.

    Arguments as :func:`kept_attention_reference`. Elements of a token's queries follow each other,
    those of the output altogether, and tables have rows of consecutive elements. A window size of
    0 leaves the stream alone; what sees nothing of it gets 0.

    ``log_sums``: ``[num_tokens, num_heads]`` float32, contiguous, written: natural logarithms of
    the sums that the softmax divides by, so that results over other keys can be merged with these.
    """
    num_heads, head_size = queries.shape[-2:]
    num_reqs, num_kv_heads = batch.seq_lens.shape[0], pages.key.shape[1]
    group = num_heads // num_kv_heads
    arguments = (
        queries,
        pages.key,
        pages.value,
        output,
        log_sums,
        num_reqs,
        *batch_arguments(queries, pages, batch, scale),
    )
    constants = {
        "SOFT_CAP": float(logits_soft_cap),
        "GROUP": group,
        "NUM_HEADS": num_heads,
        "HEAD_SIZE": head_size,
        "PAGE": pages.page_size,
        "TILE": tile_entries(head_size, max(2, pages.key.element_size())),  # FP8 widens first
    }

    def run(launch: Launch) -> None:
        rows = max(launch.rows, triton.next_power_of_2(group))
        num_blocks = output.shape[0] // (rows // group) + num_reqs + 1
        grid = num_blocks, num_kv_heads
        _prefill[grid](*arguments, **constants, ROWS=rows, **launch.options)

    types = queries.dtype, pages.key.dtype, output.dtype, log_sums is None
    key = "prefill", queries.device, *types, *constants.values()
    launch_first_that_fits(key, LAUNCHES, run)
