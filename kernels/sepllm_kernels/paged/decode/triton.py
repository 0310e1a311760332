"""``kept_decode`` in Triton: split-KV flash decoding (https://pytorch.org/blog/flash-decoding/).

A program takes one piece of what one request's few query tokens see, for the query heads of one KV
head. Pieces are of about the same size, whatever the requests' lengths (``decode_plan``); those of
a request are merged by their log-sum-exp. The number of programs depends on the shape of the batch
alone, so a captured CUDA graph serves any lengths.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import STEP_INDEX, KeptBatch, PagedKV
from sepllm_kernels.paged.arguments import batch_arguments
from sepllm_kernels.paged.decode_plan.triton import DecodePlan, decode_plan, plan_parts
from sepllm_kernels.paged.launches import Launch, launch_first_that_fits
from sepllm_kernels.paged.tiles import STAGES, attend_span, tile_entries

# More than run at once (2 to 5): the last programs, which leave processors idle, then take little
# of the time.
PROGRAMS = 6  # per processor
MIN_TILES = 2  # of a piece, where there are as many
MERGED = 32  # pieces at a time
BESIDE = tl.constexpr(4)  # elements behind each partial result: 16 bytes, of which one is used
INTERPRETED_PROCESSORS = 1  # in Triton's interpreter, enough for some pieces
MAX_ROWS = 64  # of one program: query tokens times heads per KV head


@triton.jit(do_not_specialize_on_alignment=STEP_INDEX)
def _decode(
    queries,
    key_pages,
    value_pages,
    output,
    partial,  # of :class:`DecodeBuffers`
    plan,
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
    MAX_REQS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    PAIRED: tl.constexpr = key_pages.dtype.element_ty.primitive_bitwidth == 8
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    plan_sizes, plan_starts, plan_slots, plan_requests = plan_parts(plan, MAX_REQS)
    head_start = kv_head.to(tl.int64) * head_stride
    req = tl.load(plan_requests + piece).to(tl.int64)
    if req < 0:
        return
    first = tl.load(query_start + req)
    num_tokens = tl.load(query_start + req + 1) - first
    first_piece = tl.load(plan_starts + req)
    num_pieces = tl.load(plan_starts + req + 1) - first_piece
    size = tl.load(plan_sizes + req)
    seq_len = tl.load(seq_lens + req)
    piece -= first_piece
    row = tl.arange(0, ROWS)
    token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    row_valid = row < num_tokens * GROUP
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
        key_pages + head_start,
        value_pages + head_start,
        page_stride,
        entry_stride,
        window_table + req * window_table_stride,
        kept_table + req * kept_table_stride,
        stream_ranges,
        window_size,
        num_sinks,
        piece * size,
        piece * size + size,
        scale,
        SOFT_CAP,
        HEAD_SIZE,
        PAGE,
        TILE,
        PAIRED,
    )
    # A sum that is no number is none of an empty piece: it has to reach the result.
    some = tl.where(weight_sum == 0, 1.0, weight_sum)
    result = acc / some[:, None] * value_scale
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    stored = row_valid[:, None] & (dim[None, :] < HEAD_SIZE)
    if num_pieces == 1:
        out = (token.to(tl.int64) * num_heads + head)[:, None] * HEAD_SIZE + dim[None, :]
        tl.store(output + out, result.to(output.dtype.element_ty), mask=stored)
    else:
        slot = (tl.load(plan_slots + req) + piece).to(tl.int64)
        at = ((slot * MAX_TOKENS + row // GROUP) * num_heads + head) * (HEAD_SIZE + BESIDE)
        taken = stored & (weight_sum != 0)[:, None]
        tl.store(partial + at[:, None] + dim[None, :], result, mask=taken)
        log_sum = tl.where(weight_sum == 0, float("-inf"), maximum + tl.log2(some))
        tl.store(partial + at + HEAD_SIZE, log_sum, mask=row_valid)


@triton.jit
def _merge(
    partial,
    output,
    plan,
    query_start,
    MAX_REQS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MERGED: tl.constexpr,
):
    req, offset, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, plan_starts, plan_slots, _ = plan_parts(plan, MAX_REQS)
    num_pieces = tl.load(plan_starts + req + 1) - tl.load(plan_starts + req)
    if num_pieces <= 1:
        return
    token = tl.load(query_start + req) + offset
    if token >= tl.load(query_start + req + 1):
        return
    slot = tl.load(plan_slots + req)
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    acc = tl.zeros_like(dim).to(tl.float32)
    weight_sum, maximum = 0.0, float("-inf")
    for piece in range(0, num_pieces, MERGED):
        taken = piece + tl.arange(0, MERGED)
        at = ((slot + taken).to(tl.int64) * MAX_TOKENS + offset) * NUM_HEADS + head
        at *= HEAD_SIZE + BESIDE
        log_sum = tl.load(partial + at + HEAD_SIZE, mask=taken < num_pieces, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(log_sum, 0))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weight, shrink = tl.exp2(log_sum - base), tl.exp2(maximum - base)
        loaded = (weight > 0)[:, None] & (dim[None, :] < HEAD_SIZE)
        parts = tl.load(partial + at[:, None] + dim[None, :], mask=loaded, other=0.0)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        weight_sum = weight_sum * shrink + tl.sum(weight, 0)
        maximum = new_maximum
    place = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE + dim
    result = (acc / weight_sum).to(output.dtype.element_ty)
    tl.store(output + place, result, mask=dim < HEAD_SIZE)


def extra_pieces(num_kv_heads: int, num_processors: int) -> int:
    """Pieces beside one for each request, so that every processor has enough programs."""
    return int(triton.cdiv(PROGRAMS * num_processors, num_kv_heads))


class DecodeBuffers:
    """Partial results of pieces, allocated once so that CUDA graphs can refer to them.

    Attributes:
        max_query_len: tokens of one request in a batch.
        partial: ``[pieces of split requests, max_query_len, num_heads, head_size + BESIDE]``
            float32, flat. Behind each result is the logarithm of the sum that its softmax divides
            by; -inf: nothing was taken or stored.

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
        # A request of more tiles than a piece has less than twice the pieces that those tiles fill.
        pieces = 2 * extra_pieces(num_kv_heads, num_processors)
        rows = pieces * max_query_len * num_heads
        self.max_query_len = max_query_len
        # vLLM makes the model's type the default one while it loads a model.
        elements = rows * (head_size + BESIDE.value)
        self.partial = torch.empty(elements, dtype=torch.float32, device=device)


def plan_for(
    max_num_reqs: int,
    num_kv_heads: int,
    head_size: int,
    element_size: int,
    device: torch.device,
) -> DecodePlan:
    """What :func:`make_plan` fills, for layers of these heads and bytes per stored element."""
    extra = extra_pieces(num_kv_heads, processors(device))
    return DecodePlan.allocate(max_num_reqs, extra, tile_entries(head_size, element_size), device)


def make_plan(
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    stream_ranges: torch.Tensor,
    window_size: int,
    num_sinks: int,
    plan: DecodePlan,
) -> None:
    """Cut a batch into pieces, once for all layers. Arguments are those of :class:`KeptBatch`."""
    decode_plan(query_start, seq_lens, stream_ranges, window_size, num_sinks, plan, MIN_TILES)


@cache
def decode_launches(rows: int, head_size: int, element_size: int, tile: int) -> tuple[Launch, ...]:
    """How the kernel is compiled: as the first of these that fits."""
    nbytes = tile * head_size * element_size
    warps = 8 if rows >= 64 else 4 if rows > 16 or nbytes > 8192 else 2
    return tuple(Launch(rows, warps, stages) for stages in (STAGES, STAGES - 1, 1))


def kept_decode(
    queries: torch.Tensor,
    pages: PagedKV,
    batch: KeptBatch,
    output: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    buffers: DecodeBuffers | None = None,
    plan: DecodePlan | None = None,
) -> None:
    """Attend the few tokens of each request to what they see.

    Arguments as :func:`kept_attention_reference`. Elements of a token's queries follow each other,
    those of the output altogether, and tables have rows of consecutive elements. ``buffers`` are
    shared by all layers of one shape, and the batch's ``plan`` by all layers.

    Raises:
        ValueError: a request may have more tokens than one program takes; use ``kept_prefill``.
    """
    num_heads, head_size = queries.shape[-2:]
    num_reqs, num_kv_heads = batch.seq_lens.shape[0], pages.key.shape[1]
    group, element_size = num_heads // num_kv_heads, pages.key.element_size()
    if batch.max_query_len > 1 and batch.max_query_len * group > MAX_ROWS:
        raise ValueError(
            f"{batch.max_query_len} tokens of {group} heads per KV head: at most {MAX_ROWS} rows; "
            "use kept_prefill"
        )
    if buffers is None:
        sizes = batch.max_query_len, num_heads, num_kv_heads, head_size
        buffers = DecodeBuffers(*sizes, processors(queries.device), queries.device)
    if plan is None:
        plan = plan_for(num_reqs, num_kv_heads, head_size, element_size, queries.device)
        lengths = batch.query_start, batch.seq_lens, batch.stream_ranges
        make_plan(*lengths, batch.window_size, batch.num_sinks, plan)
    _launch(queries, pages, batch, output, scale, float(logits_soft_cap), buffers, plan)
    _merge[(num_reqs, batch.max_query_len, num_heads)](
        buffers.partial,
        output,
        plan.whole,
        batch.query_start,
        MAX_REQS=plan.max_num_reqs,
        MAX_TOKENS=buffers.max_query_len,
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        MERGED=MERGED,
    )


def _launch(
    queries: torch.Tensor,
    pages: PagedKV,
    batch: KeptBatch,
    output: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
    buffers: DecodeBuffers,
    plan: DecodePlan,
) -> None:
    """Launch the kernel over the pieces of a plan."""
    num_heads, head_size = queries.shape[-2:]
    num_kv_heads, element_size = pages.key.shape[1], pages.key.element_size()
    group = num_heads // num_kv_heads
    rows = max(16, triton.next_power_of_2(batch.max_query_len * group))
    arguments = (
        queries,
        pages.key,
        pages.value,
        output,
        buffers.partial,
        plan.whole,
        *batch_arguments(queries, pages, batch, scale),
    )
    constants = {
        "SOFT_CAP": logits_soft_cap,
        "MAX_REQS": plan.max_num_reqs,
        "MAX_TOKENS": buffers.max_query_len,
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "PAGE": pages.page_size,
        "TILE": plan.tile,
    }
    grid = plan.requests.shape[0], num_kv_heads

    def run(launch: Launch) -> None:
        _decode[grid](*arguments, **constants, ROWS=launch.rows, **launch.options)

    types = queries.dtype, pages.key.dtype, output.dtype
    key = "decode", queries.device, *types, *constants.values()
    launch_first_that_fits(key, decode_launches(rows, head_size, element_size, plan.tile), run)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
