"""``kept_decode`` in Triton: split-KV flash decoding (https://pytorch.org/blog/flash-decoding/).

A program takes one split of what one request's few query tokens see, for the query heads of one KV
head. Splits are merged by their log-sum-exp. The number of splits depends on the shape of the batch
alone, so a captured CUDA graph serves any lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import KeptBatch, PagedKV
from sepllm_kernels.tiles import STAGES, attend_span, tile_entries

# More than run at once (2 to 6): the last programs, which leave processors idle, then take little
# of the time.
PROGRAMS = 10  # per processor
MAX_SPLITS = 64
INTERPRETED_PROCESSORS = 1  # in Triton's interpreter, enough for some splits
MAX_ROWS = 64  # of one program: query tokens times heads per KV head


@triton.jit
def _decode(
    queries,
    key_pages,
    value_pages,
    partial,  # [num_tokens, num_heads, num_splits, head_size]
    log_sums,  # [num_tokens, num_heads, num_splits]; -inf: nothing was taken or stored
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
    PAIRED: tl.constexpr,
):
    req, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    first = tl.load(query_start + req)
    num_tokens = tl.load(query_start + req + 1) - first
    if num_tokens == 0:
        return
    row = tl.arange(0, ROWS)
    token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    row_valid = row < num_tokens * GROUP
    seq_len = tl.load(seq_lens + req)
    acc, weight_sum, maximum = attend_span(
        queries,
        part_stride,
        token_stride,
        token,
        head,
        row_valid,
        seq_len - num_tokens + row // GROUP,
        first,
        first + num_tokens - 1,
        seq_len - 1,
        key_pages + kv_head * head_stride,
        value_pages + kv_head * head_stride,
        page_stride,
        entry_stride,
        window_table + req * window_table_stride,
        kept_table + req * kept_table_stride,
        stream_ranges,
        window_size,
        num_sinks,
        split,
        num_splits,
        scale,
        SOFT_CAP,
        HEAD_SIZE,
        PAGE,
        TILE,
        PAIRED,
    )
    some = tl.where(weight_sum > 0, weight_sum, 1.0)
    result = acc / some[:, None] * value_scale
    out = (token.to(tl.int64) * NUM_HEADS + head) * num_splits + split
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    taken = row_valid & ((weight_sum > 0) | (num_splits == 1))
    stored = taken[:, None] & (dim[None, :] < HEAD_SIZE)
    at = out[:, None] * HEAD_SIZE + dim[None, :]
    tl.store(partial + at, result.to(partial.dtype.element_ty), mask=stored)
    if num_splits > 1:
        log_sum = tl.where(weight_sum > 0, maximum + tl.log2(some), float("-inf"))
        tl.store(log_sums + out, log_sum, mask=row_valid)


@triton.jit
def _merge(
    partial,
    log_sums,
    output,
    query_start,
    num_reqs,
    NUM_SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    token, row = tl.program_id(0), tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if token >= tl.load(query_start + num_reqs):
        return  # padding, of which nothing was computed
    split = tl.arange(0, triton.next_power_of_2(NUM_SPLITS))
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    present = split < NUM_SPLITS
    at = row.to(tl.int64) * NUM_SPLITS + split
    log_sum = tl.load(log_sums + at, mask=present, other=float("-inf"))
    weight = tl.exp2(log_sum - tl.max(log_sum, 0))
    taken = (weight > 0)[:, None] & (dim[None, :] < HEAD_SIZE)
    parts = tl.load(partial + at[:, None] * HEAD_SIZE + dim[None, :], mask=taken, other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(
        output + row.to(tl.int64) * HEAD_SIZE + dim,
        result.to(output.dtype.element_ty),
        mask=dim < HEAD_SIZE,
    )


def num_splits(num_reqs: int, num_kv_heads: int, num_processors: int) -> int:
    """Splits that give every processor enough programs, where the batch alone does not."""
    wanted = triton.cdiv(PROGRAMS * num_processors, max(1, num_reqs * num_kv_heads))
    return int(min(MAX_SPLITS, wanted))


class DecodeBuffers:
    """Partial results of splits, allocated once so that CUDA graphs can refer to them.

    Args:
        max_query_len: tokens of one request in a batch.
        num_heads, num_kv_heads, head_size: of the layers.
        num_processors: of the device (streaming multiprocessors).
        device: of the pages.
    """

    def __init__(
        self,
        max_query_len: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        num_processors: int,
        device: torch.device | str,
    ) -> None:
        self.num_processors = num_processors
        # A batch is split while it has fewer requests than this, and then into so many that twice
        # as many remain, rounding up.
        requests = triton.cdiv(PROGRAMS * num_processors, num_kv_heads)
        rows = max_query_len * 2 * requests * num_heads
        self.partial = torch.empty(rows * head_size, device=device)
        self.log_sums = torch.empty(rows, device=device)


def decode_launch(rows: int, head_size: int, element_size: int) -> dict[str, int]:
    """How the kernel is compiled: entries of a tile, warps, stages of the loop."""
    tile = tile_entries(head_size, element_size)
    nbytes = tile * head_size * element_size
    warps = 8 if rows >= 64 else 4 if rows > 16 or nbytes > 8192 else 2
    return {"TILE": tile, "num_warps": warps, "num_stages": STAGES}


def kept_decode(
    queries: torch.Tensor,
    pages: PagedKV,
    batch: KeptBatch,
    output: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    buffers: DecodeBuffers | None = None,
) -> None:
    """Attend the few tokens of each request to what they see.

    Arguments as :func:`kept_attention_reference`. Elements of a token's queries follow each other,
    those of the output altogether, and tables have rows of consecutive elements. ``buffers`` are
    shared by all layers of one shape.

    Raises:
        ValueError: a request may have more tokens than one program takes; use ``kept_prefill``.
    """
    num_heads, head_size = queries.shape[-2:]
    num_reqs, num_kv_heads = batch.seq_lens.shape[0], pages.key.shape[1]
    group = num_heads // num_kv_heads
    if batch.max_query_len > 1 and batch.max_query_len * group > MAX_ROWS:
        raise ValueError(
            f"{batch.max_query_len} tokens of {group} heads per KV head: at most {MAX_ROWS} rows; "
            "use kept_prefill"
        )
    if buffers is None:
        sizes = batch.max_query_len, num_heads, num_kv_heads, head_size
        buffers = DecodeBuffers(*sizes, processors(queries.device), queries.device)
    splits = num_splits(num_reqs, num_kv_heads, buffers.num_processors)
    rows = max(16, triton.next_power_of_2(batch.max_query_len * group))
    page_stride, head_stride, entry_stride, _ = pages.key.stride()
    _decode[(num_reqs, num_kv_heads, splits)](
        queries,
        pages.key,
        pages.value,
        output if splits == 1 else buffers.partial,
        buffers.log_sums,
        batch.query_start,
        batch.seq_lens,
        batch.window_table,
        batch.kept_table,
        batch.stream_ranges,
        queries.stride(0) if queries.dim() == 4 else 0,
        queries.stride(-3),
        page_stride,
        head_stride,
        entry_stride,
        batch.window_table.stride(0),
        batch.kept_table.stride(0),
        batch.window_size,
        batch.num_sinks,
        scale * pages.key_scale,
        pages.value_scale,
        SOFT_CAP=float(logits_soft_cap),
        ROWS=rows,
        GROUP=group,
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        PAGE=pages.page_size,
        PAIRED=pages.key.element_size() == 1,
        **decode_launch(rows, head_size, pages.key.element_size()),
    )
    if splits > 1:
        _merge[(output.shape[0], num_heads)](
            buffers.partial,
            buffers.log_sums,
            output,
            batch.query_start,
            num_reqs,
            NUM_SPLITS=splits,
            HEAD_SIZE=head_size,
        )


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
