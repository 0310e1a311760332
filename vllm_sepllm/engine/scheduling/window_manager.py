"""Pages of the window group: which are worth keeping in the prefix cache behind the window.

With full attention a prefix is found as long as all its pages are there. Here the stream's
pages and the window's ``ceil((n - 1) / B)`` pages before the end of the prefix are enough. All
other window pages serve only requests that part from the text in just that place::

    turn 1  [system prompt ][question ][answer ]      o  where later requests resume
    pages    . . . . . . o o . . . . . . . . o o      o o  pages they need there
    turn 2  [system prompt ][question ][answer ][question ][answer ]

So a page that leaves the window becomes spare: still found while there is memory, evicted before
anything else. Two kinds of pages do not. Pages before a *junction*, a point where texts part: the
end of a shared system prompt. And the *tail* of a long text that is new: where the next question
about it will part from this one is not known yet, but it is not far from the prompt's end::

    request 1  [document                                  ][question ][answer ]
    its tail                                        . . . . . . . . .
    request 2  [document                                  ][question ][answer ]
    it needs                                        o o o o

A request that only goes on from the end of a known text, as a conversation does, has no tail. A
conversation's last window needs no rule: its pages are given back with the stream when the request
ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.request import Request

from vllm_sepllm.engine.scheduling.eviction import NamedPage, leaving_pages
from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.tally import WINDOW

# Tokens that a prompt has behind the text that others share with it: a question, and what a chat
# template puts around it.
QUESTION_TOKENS = 128
# A tail is at most this part of the text that is new. It would otherwise be most of what a short
# prompt leaves in the cache.
MOST_OF_NEW_TEXT = 0.25


class WindowManager(SlidingWindowManager):
    """vLLM's manager of a sliding window, with spare pages and junctions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pool = PoolState.of(self.block_pool)
        self._pages_for_hit = cdiv(self.sliding_window - 1, self.block_size)
        self._tail_pages = self._pages_for_hit + cdiv(QUESTION_TOKENS, self.block_size)
        # Of each live request: ranges of token blocks whose pages do not become spare.
        self._lasting: dict[str, list[range]] = {}
        # Such pages that have left the window, with the hashes they had.
        self._left: dict[str, list[NamedPage]] = {}

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """vLLM's; the pages found in the cache are counted."""
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        pages = self.req_to_blocks[request_id]
        self._pool.spare.discard(pages)
        self._pool.tally.found[WINDOW] += sum(not page.is_null for page in pages)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """vLLM's, from spare pages before others that are cached."""
        missing = cdiv(num_tokens, self.block_size) - len(self.req_to_blocks[request_id])
        if missing > 0:
            self._pool.spare.make_room(missing)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM's; at a request's first step also find the junctions it passes."""
        if request.request_id not in self._lasting:
            self._lasting[request.request_id] = self._visit_junctions(request)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def _visit_junctions(self, request: Request) -> list[range]:
        """Count where this request resumed, and where it would have with memory to spare.

        Returns:
            Token blocks before the junctions in its prompt, and before a long prompt's end.
        """
        hashes: Sequence[BlockHash] = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        found = self.num_cached_block.get(request.request_id, 0)
        known = max(found, len(self._pool.prefixes.kept_counts(hashes)))
        for end in {found, known} - {0}:
            is_parting = end == known and self._pool.prefixes.is_continued(hashes[end - 1])
            self._pool.junctions.visit(hashes[end - 1], self.kv_cache_group_id, is_parting)
        lasting: list[range] = []
        refreshed = 0
        for end in self._pool.junctions.among(hashes):
            first = max(0, end - self._pages_for_hit)
            if lasting and first <= lasting[-1].stop:
                lasting[-1] = range(lasting[-1].start, end)
            else:
                lasting.append(range(first, end))
            # Behind the window it resumed with, so not touched yet.
            if end < found and self._pool.junctions.is_confirmed(hashes[end - 1]):
                window = hashes[max(first, refreshed) : end]
                self._pool.spare.refresh(window, self.kv_cache_group_id)
                refreshed = end
        tail = self._tail(request.num_prompt_tokens // self.block_size, known, hashes)
        lasting.append(self._pool.tails.setdefault(request.request_id, tail))
        return lasting

    def _tail(self, end: int, known: int, hashes: Sequence[BlockHash]) -> range:
        """Token blocks of the tail of a prompt, of which ``known`` blocks are known; or none."""
        goes_on = known > 0 and not self._pool.prefixes.is_continued(hashes[known - 1])
        if goes_on or self._tail_pages > MOST_OF_NEW_TEXT * (end - known):
            return range(end, end)
        return range(end - self._tail_pages, end)

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        leaving = leaving_pages(self.req_to_blocks.get(request_id, []), first_block, last_block)
        if not leaving:
            return  # most steps; vLLM's own walk compares pages field by field
        super()._remove_blocks_in_range(request_id, first_block, last_block)
        self._pool.tally.returned[WINDOW] += len(leaving)
        lasting = self._lasting.get(request_id, ())
        for block, page in reversed(leaving):
            if any(block in blocks for blocks in lasting):
                self._left.setdefault(request_id, []).append(NamedPage.of(page))
            else:
                self._pool.spare.add(page)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that ended or was preempted; returns its pages.

        Pages of it that are worth keeping are no older in the cache than those that it returns.
        """
        for page in self._left.pop(request_id, ()):
            self._pool.spare.use_again(page)
        self._lasting.pop(request_id, None)
        self._pool.tails.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
