"""The kept stream of one request, on the scheduler's side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_sepllm.kept_counts import KeptCounts
from vllm_sepllm.policy import KeepRule


@dataclass(eq=False)
class RequestStream:
    """What the manager knows of a request, from its first count until its pages are given back.

    Attributes:
        counts: of its tokens whose ids are known.
        most: tokens known, tokens in flight, and the pages these take at most; as last counted.
        lasting: with a bound, pages that those who resume at its junctions or its tail see.
        num_left: token blocks that have left the window, as far as they are counted.
        leaves_at: tokens computed with which the next one may leave.
        has_started: its first step was seen.
        has_keys: keys of its pages were noted, and not only those of pages that it has found.
        pending: keys of this step's pages: key, page, tokens of the prefix.
    """

    counts: KeptCounts
    most: tuple[int, int, int] | None = None
    lasting: Sequence[range] = ()
    num_left: int = 0
    leaves_at: int = 0
    has_started: bool = False
    has_keys: bool = False
    pending: list[tuple[BlockHash, KVCacheBlock, int]] = field(default_factory=list)

    def most_pages(self, rule: KeepRule, num_in_flight: int, block_size: int) -> int:
        """Pages that its known tokens take at most at once, under a bound on separators.

        Args:
            rule: with a bound.
            num_in_flight: tokens that steps in flight compute at most.
            block_size: entries of a page.
        """
        prefix = self.counts.prefix
        # Asked again and again while a request waits.
        if self.most is None or self.most[:2] != (len(prefix), num_in_flight):
            computed = np.arange(len(prefix))
            ahead = prefix[np.minimum(computed + num_in_flight, len(prefix) - 1)]
            starts = rule.seen.first_entries(rule.stream_limit(prefix, computed))
            left = starts // block_size - rule.seen.num_sink_pages(block_size)
            pages = int((-(-ahead // block_size) - np.maximum(0, left)).max())
            self.most = len(prefix), num_in_flight, pages
        return self.most[2]

    def keep(self, rule: KeepRule, ends: Sequence[int], tail: range, block_size: int) -> None:
        """Note which pages last, under a bound on separators.

        Args:
            rule: with a bound.
            ends: of junctions, in token blocks.
            tail: token blocks; who resumes in it needs its first ones for the window.
            block_size: tokens of a token block, and entries of a page.
        """
        prefix, lasting = self.counts.prefix, []
        resumed = tail.start + cdiv(rule.window_size - 1, block_size)
        for first, end in [*zip(ends, ends, strict=True), (min(resumed, tail.stop), tail.stop)]:
            window_start = int(rule.window_start(first * block_size))
            limit = int(prefix[window_start // block_size * block_size])  # as a hit is looked for
            seen = rule.seen.unseen_pages(limit, block_size)[1]
            lasting.append(range(seen, cdiv(int(prefix[end * block_size]), block_size)))
        self.lasting = lasting

    def leave(self, stop: int, block_size: int) -> tuple[int, int]:
        """Count the token blocks before ``stop``, all behind the window now.

        Blocks with tokens whose ids are not known yet wait for the next call.

        Returns:
            Kept tokens and dropped ones in the blocks that were not counted before.
        """
        prefix = self.counts.prefix
        first, stop = self.num_left, min(stop, (len(prefix) - 1) // block_size)
        if stop <= first:
            return 0, 0
        self.num_left = stop
        kept = int(prefix[stop * block_size] - prefix[first * block_size])
        return kept, (stop - first) * block_size - kept
