"""Which pages each query of a batch reads: the compacted block tables of a step.

Two kinds of rows, by what vLLM's C++ paged kernel can express:

*paged*: one causal call over a block table, ragged only in its last page. Either queries
whose whole context is inside the window (plain causal attention over the window pages), or a
decode step over the compacted table::

    kept pages      [full][full][full][tail.. ]      tail: kept entries that fill no page
    window pages    [..head][full][full][tail..]     head and tail: the window's partial pages
    compacted       [full][full][full][full][full][staged .. ][tail.. ]

The order of keys does not matter to one query, so the full pages stay where they are and only
the partial ones are copied into a *staging* page. If the window size is a multiple of the page
size, head and tail of the window fill exactly one page, each entry already at its own offset,
and the tail of the stream is read in place as the ragged last page. Otherwise the three
partial pieces are packed entry by entry.

In cache positions the parts a query reads want it rotated to different angles, and the kernel takes
it at one. So it is rotated to that of the largest part, and the entries of the others are staged
with their keys rotated the rest of the way: at most about a window of them, or what a bound on
separators keeps beside it, whichever is less.

*staircase*: the queries of a prompt chunk that see less than their whole context. Each has its
own limit on the stream, which ``kept_prefill`` takes. A chunk that begins inside the first window
and ends behind it has queries of both kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.engine.cpu.tables import (
    IntArray,
    MergedPages,
    PackedEntries,
    Shifts,
    Span,
    TableArray,
    TableBuilder,
)
from vllm_sepllm.policy import CountArray, KeepRule


def staging_pages_per_request(options: SepLLMConfig, block_size: int, max_model_len: int) -> int:
    """Staging pages a decode step may need, whatever the request has read.

    One, or the packed rest of three pages; with a bound on separators that of five, since the sinks
    and the newest separators do not meet. In cache positions all parts but the largest, and the
    ragged ends of that one. Never more than the pages of the longest context, and a part is no
    larger than what such a context has room for.

    Args:
        options: window, sinks and bound may be larger than any context.
        block_size: entries of a page.
        max_model_len: tokens of the longest context.
    """
    window = min(options.window_size, max_model_len)
    behind = max_model_len - window
    sizes = [window]
    packed = 1 if options.window_size % block_size == 0 else 3
    if options.max_separator_tokens is not None:
        sizes += [min(n, behind) for n in (options.num_sink_tokens, options.max_separator_tokens)]
        packed = 5
    if options.position_mode == "cache":
        # Without a bound the stream is as large as the window at most, or else the window is
        # staged.
        entries = sum(sizes) - max(sizes) if len(sizes) > 1 else min(window, behind)
        packed = max(5, -(-(entries + 2 * (block_size - 1)) // block_size))
    return min(packed, -(-max_model_len // block_size))


@dataclass(frozen=True)
class Batch:
    """Requests of one step.

    Attributes:
        query_start: ``[num_reqs + 1]`` int32, first batch index of each request's queries.
        starts, stops: ``[num_reqs]`` positions ``[start, stop)`` computed in this step.
        rows: ``[num_reqs]`` row of each request in ``kept_prefix``.
        kept_prefix: ``[max_num_reqs, max_model_len + 1]`` kept tokens below each position.
        stream_pages: ``[num_reqs, max_pages]`` block table of the kept group.
    """

    query_start: CountArray
    starts: IntArray
    stops: IntArray
    rows: IntArray
    kept_prefix: CountArray
    stream_pages: TableArray


@dataclass(frozen=True)
class PagedPlan:
    """Queries served by one call of the paged kernel, the first ones of each request's chunk.

    Attributes:
        requests: ``n`` indices into the batch.
        block_table: ``[n, max_pages]`` int32; staged pages count from 0.
        staged: row and column of every staged page in ``block_table``, ``[num_staged]`` each.
        seq_lens: ``[n]`` int32, keys of each request.
        query_start: ``[n + 1]`` int32, first query of each request among those of this call.
    """

    requests: list[int]
    block_table: TableArray
    staged: tuple[IntArray, IntArray]
    seq_lens: npt.NDArray[np.int32]
    query_start: npt.NDArray[np.int32]
    merged: MergedPages | None
    packed: PackedEntries | None
    shifts: Shifts | None = None


@dataclass(frozen=True)
class Staircase:
    """The queries of one request's chunk that see less than their whole context.

    Attributes:
        request: index into the batch.
        first_query: how many of the chunk's queries the paged kernel serves; the others follow.
        stream_pages: pages of the stream up to the last query's limit; with a bound on
            separators those of the sinks, and from the first query's start on.
        window_pages: pages of the window tokens before the chunk.
        window_first: offset in ``window_pages[0]`` of the first of them.
        window_length: how many they are.
        chunk_first: token of the chunk that the window goes on with, up to the chunk's end.
        stream_limits: ``[num_queries]`` entries of ``stream_pages`` each query sees.
        stream_starts: ``[num_queries]`` with a bound, the first of them beside the sinks.
        stream_shifts, sink_shifts: ``[num_queries]`` see :meth:`KeepRule.stream_shift`.
    """

    request: int
    first_query: int
    stream_pages: TableArray
    window_pages: TableArray
    window_first: int
    window_length: int
    chunk_first: int
    stream_limits: CountArray
    stream_starts: CountArray | None
    stream_shifts: IntArray
    sink_shifts: IntArray


@dataclass(frozen=True)
class BatchPlan:
    """How one step reads both groups."""

    batch: Batch
    paged: PagedPlan | None
    staircase: list[Staircase]


def plan_batch(
    rule: KeepRule,
    batch: Batch,
    window_pages: TableArray,
    block_size: int,
    in_cache_positions: bool = False,
) -> BatchPlan:
    """Plan a step.

    Args:
        rule: which tokens are kept.
        batch: the requests.
        window_pages: ``[num_reqs, max_pages]`` block table of the window group.
        block_size: entries of a page.
        in_cache_positions: stream keys are rotated to their entries, see ``policy``.
    """
    paged, staircase = [], []
    spans = zip(batch.starts.tolist(), batch.stops.tolist(), strict=True)
    for request, (start, stop) in enumerate(spans):
        if stop == start + 1:
            paged.append((request, start, stop))
            continue
        inside = min(stop, rule.window_size)  # queries up to here see all before them
        if start < inside:
            paged.append((request, start, inside))
        if inside < stop and start < stop:
            first = max(start, inside)
            staircase.append(_plan_staircase(rule, batch, request, first, window_pages, block_size))
    reads = None
    if paged:
        reads = _plan_paged(rule, batch, paged, window_pages, block_size, in_cache_positions)
    return BatchPlan(batch, reads, staircase)


def _plan_staircase(
    rule: KeepRule,
    batch: Batch,
    request: int,
    first_position: int,
    tables: TableArray,
    block_size: int,
) -> Staircase:
    """Plan the queries of a request from ``first_position`` on."""
    start, stop = int(batch.starts[request]), int(batch.stops[request])
    prefix, positions = batch.kept_prefix[batch.rows[request]], np.arange(first_position, stop)
    limits = rule.stream_limit(prefix, positions)
    shifts = rule.stream_shift(limits, positions), rule.sink_shift(limits, positions)
    first = int(rule.window_start(first_position))
    length = max(0, start - first)
    first_page, last_page = first // block_size, -(-start // block_size)
    stream = batch.stream_pages[request, : -(-int(limits[-1]) // block_size)]
    starts = None
    if rule.max_separator_tokens is not None:
        starts = rule.seen.first_entries(limits)
        unseen, seen_again = rule.seen.unseen_pages(int(limits[0]), block_size)
        stream = np.concatenate([stream[:unseen], stream[seen_again:]])
        # If any is left out, every query starts behind it.
        left_out = (seen_again - unseen) * block_size
        limits, starts = limits - left_out, starts - left_out
    return Staircase(
        request,
        first_position - start,
        stream,
        tables[request, first_page:last_page] if length else tables[request, :0],
        first % block_size,
        length,
        max(0, first - start),
        limits,
        starts,
        *shifts,
    )


def _plan_paged(
    rule: KeepRule,
    batch: Batch,
    spans: list[tuple[int, int, int]],
    window_pages: TableArray,
    block_size: int,
    in_cache_positions: bool,
) -> PagedPlan:
    # Plain Python on purpose: a few numbers per request, where numpy's calls cost more.
    rows, query_start = [], [0]
    for request, start, stop in spans:
        first = max(0, stop - rule.window_size)  # of the last query's window
        limit = int(batch.kept_prefix[batch.rows[request], first])
        sinks, begin = rule.seen.parts(limit)
        rows.append((request, sinks, begin, limit, first, stop))
        query_start.append(query_start[-1] + stop - start)
    lengths = [s + limit - begin + stop - first for _, s, begin, limit, first, stop in rows]
    seq_lens = np.array(lengths, dtype=np.int32)
    builder = TableBuilder(len(rows), -(-int(seq_lens.max()) // block_size), block_size)
    is_bounded = rule.max_separator_tokens is not None
    for row, (request, sinks, begin, limit, first, stop) in enumerate(rows):
        pages, window = batch.stream_pages[request], Span(window_pages[request], first, stop)
        # One kind of copies for all rows.
        if not (in_cache_positions or is_bounded):
            builder.add(row, Span(pages, 0, limit), window)
            continue
        # Shifts that the parts ask of the query: see KeepRule.stream_shift and sink_shift.
        shift = first - limit if in_cache_positions else 0
        sink_shift = shift + max(0, begin - sinks) if in_cache_positions else 0
        builder.add_spans(
            row, (Span(pages, 0, sinks, -sink_shift), Span(pages, begin, limit, -shift), window)
        )
    return PagedPlan(
        [request for request, _, _ in spans],
        builder.table,
        builder.staged(),
        seq_lens,
        np.array(query_start, dtype=np.int32),
        builder.merged(),
        builder.packed(),
        builder.shifts(np.diff(query_start)) if in_cache_positions else None,
    )
