"""Free pages that are still in the prefix cache but least likely to be found again.

vLLM evicts cached pages in the order they were given back. Window pages are given back all the
time while their request runs, so in that order they would outlive the streams of requests that
ended a little earlier, for nothing: see ``window_manager.py``. Spare pages go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

_spare_pages: WeakKeyDictionary[BlockPool, SparePages] = WeakKeyDictionary()


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


class SparePages:
    """The spare pages of one block pool, the longest spare first.

    The pages stay in the pool's own free queue and prefix cache, so a request can still find
    them; this is only a note of which to evict first.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._free = block_pool.free_block_queue
        self._evict = block_pool._maybe_evict_cached_block
        self._pages: OrderedDict[int, tuple[KVCacheBlock, BlockHashWithGroupId]] = OrderedDict()

    @classmethod
    def of(cls, block_pool: BlockPool) -> SparePages:
        """The spare pages of a block pool."""
        spare = _spare_pages.get(block_pool)
        if spare is None:
            spare = _spare_pages[block_pool] = cls(block_pool)
        return spare

    def add(self, page: KVCacheBlock) -> None:
        """Note a page that a request has given back; nothing if it is in use or not cached."""
        if page.ref_cnt == 0 and page.block_hash is not None:
            self._pages[page.block_id] = page, page.block_hash
            self._pages.move_to_end(page.block_id)

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
            page, block_hash = self._pages.popitem(last=False)[1]
            # Since it was noted it may have been found again, or evicted by others.
            if page.ref_cnt == 0 and page.block_hash is block_hash:
                self._evict(page)
                self._free.remove(page)
                evicted.append(page)
                num_pages -= 1
        self._free.prepend_n(evicted)
