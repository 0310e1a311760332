"""The compacted block table of a step, and the copies into staging pages that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
TableArray = npt.NDArray[np.int32]


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
class Shifts:
    """How queries and staged keys of a step are rotated, in cache positions.

    Attributes:
        positions: ``[num_turns]`` int64, positions forward; 0 comes first.
        of_queries: ``[num_queries]`` int64, shift of each query of the paged call.
        of_entries: ``[num_entries]`` int64, shift of each of ``PackedEntries``.
    """

    positions: IntArray
    of_queries: IntArray
    of_entries: IntArray


class Span(NamedTuple):
    """Entries ``[start, stop)`` of a request's pages.

    Attributes:
        pages: block table of the request in one group.
        start, stop: entries.
        shift: in cache positions, positions forward that these entries want the query rotated by.
    """

    pages: TableArray
    start: int
    stop: int
    shift: int = 0

    def piece(self, start: int, stop: int, page_size: int, shift: int = 0) -> Piece:
        """Entries ``[start, stop)`` of it, which lie in one page."""
        return Piece(int(self.pages[start // page_size]), start % page_size, stop - start, shift)


class Piece(NamedTuple):
    """Entries of one page that are copied one by one.

    Attributes:
        page: in the block pool.
        offset: of the first entry in its page.
        length: entries.
        shift: place of their shift among the shifts of the step.
    """

    page: int
    offset: int
    length: int
    shift: int


class TableBuilder:
    """Fills the compacted block table row by row.

    Args:
        num_rows: of the table.
        width: pages of a row at most.
        block_size: entries of a page.
    """

    def __init__(self, num_rows: int, width: int, block_size: int) -> None:
        self.table: TableArray = np.zeros((num_rows, width), dtype=np.int32)
        self._block_size = block_size
        self._staged: list[tuple[int, int]] = []  # row and column, in order of staging pages
        self._merged: list[tuple[int, int, int]] = []
        self._packed: list[Piece] = []
        self._slots: list[int] = []  # staging slot of the first entry of each
        self._shifts = {0: 0}  # place of each amount
        self._of_rows: list[int] = []

    def add(self, row: int, stream: Span, window: Span) -> None:
        """Name the pages of both spans; of the stream all from its first entry on.

        If partial pages of the window fill one, they are merged; otherwise they are packed with
        the rest of the stream. That is left where it is and read in place if it can go last.
        """
        size = self._block_size
        full, tail = divmod(stream.stop, size)
        first = -(-window.start // size)  # first page that lies inside it from its beginning
        last = window.stop // size  # first page that does not lie inside it to its end
        column = self._put(row, 0, stream.pages[:full])
        rest = stream.pages[full : full + (tail > 0)]
        if window.start % size == 0 and (tail == 0 or window.stop % size == 0):
            # No partial page, or one: it goes last and is read in place.
            column = self._put(row, column, window.pages[first : -(-window.stop // size)])
            self._put(row, column, rest)
            return
        column = self._put(row, column, window.pages[first:last])
        if window.start % size == window.stop % size:
            head, foot = window.pages[window.start // size], window.pages[last]
            self._merged.append((int(head), int(foot), window.stop % size))
            column = self._put_staged(row, column, 1)
            self._put(row, column, rest)
            return
        head_stop = min(first * size, window.stop)
        pieces = [window.piece(window.start, head_stop, size)]
        if tail:
            pieces.append(stream.piece(full * size, stream.stop, size))
        if window.stop > max(head_stop, last * size):
            pieces.append(window.piece(last * size, window.stop, size))
        self._pack(row, column, pieces)

    def add_spans(self, row: int, spans: Sequence[Span]) -> None:
        """Name the pages of all spans; ragged ends are packed.

        The query is rotated as the largest span asks. Of another that asks for something else all
        entries are packed, to be rotated the other way.
        """
        size, column = self._block_size, 0
        given = max(spans, key=lambda span: span.stop - span.start).shift
        self._of_rows.append(self._place(given))
        pieces: list[Piece] = []
        for span in spans:
            start, stop = span.start, span.stop
            if start == stop:
                continue
            first, last = -(-start // size), stop // size  # full pages
            own = 0
            if span.shift != given:
                # The query lacks ``shift - given``, so keys are rotated by as much the other way.
                own = self._place(given - span.shift)
                ends = list(pairwise([start, *range(first * size, stop, size), stop]))
            elif first <= last:
                column = self._put(row, column, span.pages[first:last])
                ends = [(start, first * size), (last * size, stop)]
            else:
                ends = [(start, stop)]  # inside one page
            pieces += [span.piece(low, high, size, own) for low, high in ends if low < high]
        if pieces:
            self._pack(row, column, pieces)

    def _place(self, positions: int) -> int:
        return self._shifts.setdefault(positions, len(self._shifts))

    def _pack(self, row: int, column: int, pieces: list[Piece]) -> None:
        slot = first = len(self._staged) * self._block_size
        for piece in pieces:
            self._packed.append(piece)
            self._slots.append(slot)
            slot += piece.length
        self._put_staged(row, column, -(-(slot - first) // self._block_size))

    def _put(self, row: int, column: int, pages: TableArray) -> int:
        stop = column + len(pages)
        self.table[row, column:stop] = pages
        return stop

    def _put_staged(self, row: int, column: int, count: int) -> int:
        for i in range(column, column + count):
            self.table[row, i] = len(self._staged)
            self._staged.append((row, i))
        return column + count

    def staged(self) -> tuple[IntArray, IntArray]:
        """Row and column of every staged page, in order."""
        rows, columns = np.asarray(self._staged, dtype=np.int64).reshape(-1, 2).T
        return rows, columns

    def merged(self) -> MergedPages | None:
        """Staged pages that two pages fill; ``None`` if there are none."""
        if not self._merged:
            return None
        heads, tails, splits = np.asarray(self._merged, dtype=np.int64).T.copy()
        return MergedPages(heads, tails, splits)

    def packed(self) -> PackedEntries | None:
        """Entries that are copied one by one; ``None`` if there are none."""
        if not self._packed:
            return None
        pages, offsets, counts, _ = np.asarray(self._packed, dtype=np.int64).T
        slots = np.asarray(self._slots, dtype=np.int64)
        # Offsets within each piece: 0, 1, ... count - 1.
        step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return PackedEntries(
            np.repeat(pages, counts),
            np.repeat(offsets, counts) + step,
            np.repeat(slots, counts) + step,
        )

    def shifts(self, query_lens: IntArray) -> Shifts | None:
        """How queries and packed entries are rotated; ``None`` if none is."""
        if len(self._shifts) == 1:
            return None
        packed = np.asarray(self._packed, dtype=np.int64).reshape(-1, 4)
        return Shifts(
            np.array(list(self._shifts), dtype=np.int64),
            np.repeat(np.array(self._of_rows, dtype=np.int64), query_lens),
            np.repeat(packed[:, 3], packed[:, 2]),
        )
