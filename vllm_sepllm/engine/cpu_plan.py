"""Which pages each query of a batch reads: the compacted block tables of a step.

Two kinds of rows, by what vLLM's C++ paged kernel can express:

*paged*: one causal call over a block table, ragged only in its last page. Either a request
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

*staircase*: a prompt chunk that reaches behind the window. Each of its queries has its own
limit on the stream, which ``kept_prefill`` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_sepllm.policy import CountArray, KeptPolicy

IntArray = npt.NDArray[np.int64]
TableArray = npt.NDArray[np.int32]


def staging_pages_per_request(window_size: int, block_size: int) -> int:
    """Staging pages a decode step may need: one, or the packed rest of three pages."""
    return 1 if window_size % block_size == 0 else 3


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
class MergedPages:
    """Staged pages that take one page's entries below an offset, another's from there on.

    Page ``j`` of the staging area: entries ``[0, splits[j])`` of ``tails[j]``, the rest of
    ``heads[j]``. All ``[num_staged]``.
    """

    heads: IntArray
    tails: IntArray
    splits: IntArray


@dataclass(frozen=True)
class PackedEntries:
    """Entries copied one by one: ``[num_entries]`` source page and offset, staging slot."""

    pages: IntArray
    offsets: IntArray
    slots: IntArray


@dataclass(frozen=True)
class PagedRows:
    """Requests served by one call of the paged kernel.

    Attributes:
        requests: ``[n]`` indices into the batch.
        block_table: ``[n, max_pages]`` int32; staged pages count from 0.
        staged: ``[n, max_pages]`` which entries of ``block_table`` are staged pages.
        seq_lens: ``[n]`` int32, keys of each request.
    """

    requests: IntArray
    block_table: TableArray
    staged: npt.NDArray[np.bool_]
    seq_lens: npt.NDArray[np.int32]
    merged: MergedPages | None
    packed: PackedEntries | None


@dataclass(frozen=True)
class StaircaseRow:
    """One request's chunk that reaches behind the window.

    Attributes:
        request: index into the batch.
        stream_pages: pages of the stream up to the last query's limit.
        window_pages: pages of the window tokens before the chunk.
        window_first: offset in ``window_pages[0]`` of the first of them.
        window_length: how many they are.
        stream_limits: ``[num_queries]`` entries each query sees.
    """

    request: int
    stream_pages: TableArray
    window_pages: TableArray
    window_first: int
    window_length: int
    stream_limits: CountArray


@dataclass(frozen=True)
class BatchPlan:
    """How one step reads both groups."""

    batch: Batch
    paged: PagedRows | None
    staircase: list[StaircaseRow]


def plan_batch(
    policy: KeptPolicy, batch: Batch, window_pages: TableArray, block_size: int
) -> BatchPlan:
    """Plan a step.

    Args:
        policy: which tokens are kept.
        batch: the requests.
        window_pages: ``[num_reqs, max_pages]`` block table of the window group.
        block_size: entries of a page.
    """
    queries = batch.stops - batch.starts
    inside = batch.stops <= policy.window_size
    paged = np.nonzero((queries > 0) & (inside | (queries == 1)))[0]
    staircase = np.nonzero((queries > 1) & ~inside)[0]
    return BatchPlan(
        batch,
        _plan_paged(policy, batch, paged, window_pages, block_size) if paged.size else None,
        [_plan_staircase(policy, batch, int(i), window_pages[i], block_size) for i in staircase],
    )


def _plan_staircase(
    policy: KeptPolicy, batch: Batch, request: int, window_pages: TableArray, block_size: int
) -> StaircaseRow:
    start, stop = int(batch.starts[request]), int(batch.stops[request])
    prefix = batch.kept_prefix[batch.rows[request]]
    limits = policy.stream_limit(prefix, np.arange(start, stop))
    first = int(policy.window_start(start))
    first_page, last_page = first // block_size, -(-start // block_size)
    num_stream_pages = -(-int(limits[-1]) // block_size)
    return StaircaseRow(
        request,
        batch.stream_pages[request, :num_stream_pages],
        window_pages[first_page:last_page],
        first % block_size,
        start - first,
        limits,
    )


def _plan_paged(
    policy: KeptPolicy,
    batch: Batch,
    requests: IntArray,
    window_pages: TableArray,
    block_size: int,
) -> PagedRows:
    stops = batch.stops[requests]
    starts = np.maximum(0, stops - policy.window_size)  # first position of the last window
    limits = batch.kept_prefix[batch.rows[requests], starts]
    seq_lens = limits + (stops - starts).astype(np.int32)
    builder = _TableBuilder(len(requests), -(-int(seq_lens.max()) // block_size), block_size)
    spans = zip(requests, limits.tolist(), starts.tolist(), stops.tolist(), strict=True)
    for row, (request, limit, start, stop) in enumerate(spans):
        stream, window = batch.stream_pages[request], window_pages[request]
        builder.add(row, stream, limit, window, start, stop)
    merged, packed = builder.copies()
    return PagedRows(
        requests,
        builder.table,
        builder.staged,
        seq_lens,
        merged,
        packed,
    )


class _TableBuilder:
    """Fills the compacted block table row by row."""

    def __init__(self, num_rows: int, width: int, block_size: int) -> None:
        self.table: TableArray = np.zeros((num_rows, width), dtype=np.int32)
        self.staged = np.zeros((num_rows, width), dtype=np.bool_)
        self._block_size = block_size
        self._num_staged = 0
        self._merged: list[tuple[int, int, int]] = []
        self._packed: list[tuple[int, int, int, int]] = []  # page, offset, count, staging slot

    def add(
        self, row: int, stream: TableArray, limit: int, window: TableArray, start: int, stop: int
    ) -> None:
        """Name the pages of stream entries ``[0, limit)`` and window ``[start, stop)``."""
        size = self._block_size
        full, tail = divmod(limit, size)
        first = -(-start // size)  # first page that lies inside the window from its beginning
        last = stop // size  # first page that does not lie inside it to its end
        column = self._put(row, 0, stream[:full])
        if start % size == 0 and (tail == 0 or stop % size == 0):
            # No partial page, or one: it goes last and is read in place.
            column = self._put(row, column, window[first : -(-stop // size)])
            self._put(row, column, stream[full : full + (tail > 0)])
            return
        column = self._put(row, column, window[first:last])
        if start % size == stop % size:
            self._merged.append((int(window[start // size]), int(window[last]), stop % size))
            column = self._put_staged(row, column, 1)
            self._put(row, column, stream[full : full + (tail > 0)])
            return
        head_stop = min(first * size, stop)
        pieces = [(window[start // size], start % size, head_stop - start)]
        if tail:
            pieces.append((stream[full], 0, tail))
        if stop > head_stop and stop > last * size:
            pieces.append((window[last], 0, stop - last * size))
        self._pack(row, column, pieces)

    def _pack(self, row: int, column: int, pieces: list[tuple[Any, int, int]]) -> None:
        slot = self._num_staged * self._block_size
        count = 0
        for page, offset, length in pieces:
            self._packed.append((page, offset, length, slot + count))
            count += length
        self._put_staged(row, column, -(-count // self._block_size))

    def _put(self, row: int, column: int, pages: TableArray) -> int:
        self.table[row, column : column + len(pages)] = pages
        return column + len(pages)

    def _put_staged(self, row: int, column: int, count: int) -> int:
        stop = column + count
        self.table[row, column:stop] = np.arange(self._num_staged, self._num_staged + count)
        self.staged[row, column:stop] = True
        self._num_staged += count
        return stop

    def copies(self) -> tuple[MergedPages | None, PackedEntries | None]:
        merged = packed = None
        if self._merged:
            heads, tails, splits = np.asarray(self._merged, dtype=np.int64).T
            merged = MergedPages(heads, tails, splits)
        if self._packed:
            pages, offsets, counts, slots = np.asarray(self._packed, dtype=np.int64).T
            # Offsets within each piece: 0, 1, ... count - 1.
            step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            packed = PackedEntries(
                np.repeat(pages, counts),
                np.repeat(offsets, counts) + step,
                np.repeat(slots, counts) + step,
            )
        return merged, packed
