"""What the prefix cache evicts first, and what last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

# Every turn of a conversation resumes once where the turn before ended, so once is not enough.
VISITS = 2


class Junctions:
    """Points where texts part, such as the end of a system prompt or of a document.

    These are points that an earlier text went on from, and points at which more than one request
    has resumed. With full attention, whoever uses a prefix also uses everything before it, so the
    shared part of many conversations stays in the cache by itself. Here a conversation that resumes
    at its own end reads neither the window pages nor the partly filled stream page of the system
    prompt's end: they would be evicted while every user still relies on them.

    A point where texts have parted once may be needed by nobody again: a chat that leaves the
    reasoning of earlier turns out makes one in each turn. So it keeps the pages of the request that
    made it, and only later visits *confirm* it.

    Args:
        capacity: points remembered; the least recent are forgotten.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._group: int | None = None
        self._visits: OrderedDict[BlockHash, int] = OrderedDict()

    def visit(self, block_hash: BlockHash, group_id: int, is_parting: bool = False) -> None:
        """Count a request that resumes, or could have, behind the block of this hash.

        Groups resume together, so one of them counts: whichever comes first.

        Args:
            block_hash: of the block.
            group_id: of the group that counts.
            is_parting: an earlier text went on from here, so this is a junction at once.
        """
        if self._group is None:
            self._group = group_id
        if group_id != self._group:
            return
        self._visits[block_hash] = self._visits.pop(block_hash, 0) + (VISITS if is_parting else 1)
        if len(self._visits) > self._capacity:
            self._visits.popitem(last=False)

    def among(self, block_hashes: Sequence[BlockHash]) -> list[int]:
        """Ends of the junctions along a prompt, in token blocks."""
        ends = []
        for end, block_hash in enumerate(block_hashes, 1):
            if self._visits.get(block_hash, 0) >= VISITS:
                self._visits.move_to_end(block_hash)
                ends.append(end)
        return ends

    def is_confirmed(self, block_hash: BlockHash) -> bool:
        """Whether requests came back to a junction after it became one."""
        return self._visits.get(block_hash, 0) > VISITS


def leaving_pages(
    pages: Sequence[KVCacheBlock], first: int, stop: int
) -> list[tuple[int, KVCacheBlock]]:
    """Index and page of those in ``[first, stop)`` that have not left yet, the last one first."""
    leaving = []
    for index in range(min(stop, len(pages)) - 1, first - 1, -1):
        if pages[index].is_null:  # so are all before it; a step looks at a page or two
            break
        leaving.append((index, pages[index]))
    return leaving


@dataclass(frozen=True)
class NamedPage:
    """A page and its hash at some time: it holds the same as long as it has that hash."""

    page: KVCacheBlock
    block_hash: BlockHashWithGroupId | None

    @staticmethod
    def of(page: KVCacheBlock) -> NamedPage:
        """A page as it is now."""
        return NamedPage(page, page.block_hash)

    @property
    def is_free_and_cached(self) -> bool:
        """Whether nobody holds it, and it is still what it was."""
        is_same = self.block_hash is not None and self.page.block_hash is self.block_hash
        return is_same and self.page.ref_cnt == 0


class SparePages:
    """Free pages of a block pool that are still cached but least likely to be found again.

    vLLM evicts cached pages in the order they were given back. Window pages are given back all the
    time while their request runs, so in that order they would outlive the streams of requests that
    ended a little earlier, for nothing: see ``window_manager.py``. Spare pages go first, the
    longest spare before others.

    They stay in the pool's own free queue and prefix cache, so a request can still find them; this
    is only a note of which to evict first.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._block_pool = block_pool
        self._free = block_pool.free_block_queue
        self._evict = block_pool._maybe_evict_cached_block
        self._pages: OrderedDict[int, NamedPage] = OrderedDict()

    def add(self, page: KVCacheBlock) -> None:
        """Note a page that a request has given back; nothing if it is in use or not cached."""
        if page.ref_cnt == 0 and page.block_hash is not None:
            self._pages[page.block_id] = NamedPage.of(page)
            self._pages.move_to_end(page.block_id)

    def forget_uncomputed(
        self, request: Request, managers: Iterable[SingleTypeKVCacheManager]
    ) -> None:
        """Take pages out of the cache that a step was to fill which the request is taken out of.

        vLLM notes them when it schedules a step. A request of higher priority may then preempt
        this one before the step runs (vLLM issue 57580).

        Args:
            request: that is preempted; ``num_computed_tokens`` are without this step.
            managers: of groups that note pages so; the kept group waits for the step.
        """
        for manager in managers:
            pages = manager.req_to_blocks.get(request.request_id, ())
            stop = manager.num_cached_block.get(request.request_id, 0)
            for page in pages[request.num_computed_tokens // manager.block_size : stop]:
                if page.block_hash is not None:
                    self._evict(page)

    def discard(self, pages: Iterable[KVCacheBlock]) -> None:
        """Forget that pages were spare: they are in use again, or worth keeping."""
        for page in pages:
            self._pages.pop(page.block_id, None)

    def refresh(self, block_hashes: Iterable[BlockHash], group_id: int) -> None:
        """Let cached pages count as just used, so that they are evicted last."""
        for block_hash in block_hashes:
            pages = self._block_pool.get_cached_block(block_hash, [group_id])
            if pages is not None:
                self.use(pages)

    def use(self, pages: Sequence[KVCacheBlock]) -> None:
        """Let pages that are in the cache count as just used."""
        self.discard(pages)
        self._block_pool.touch(pages)
        self._block_pool.free_blocks(pages)

    def use_again(self, named: NamedPage) -> None:
        """Let a page count as just used, if it is free and still what it was when it was named."""
        if named.is_free_and_cached:
            self.use([named.page])

    def make_room(self, num_pages: int) -> None:
        """Let the next pages that the pool hands out be empty or spare, as far as there are any.

        Args:
            num_pages: pages about to be taken from the pool.
        """
        page = self._free.fake_free_list_head.next_free_block
        while num_pages > 0 and page is not None and page.block_hash is None:
            page = page.next_free_block
            num_pages -= 1
        evicted = []
        while num_pages > 0 and self._pages:
            named = self._pages.popitem(last=False)[1]
            if named.is_free_and_cached:  # it may have been evicted by others
                self._evict(named.page)
                self._free.remove(named.page)
                evicted.append(named.page)
                num_pages -= 1
        self._free.prepend_n(evicted)
