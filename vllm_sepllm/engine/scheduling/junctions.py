"""Points at which more than one request has resumed, such as the end of a system prompt.

With full attention, whoever uses a prefix also uses everything before it, so the shared part of
many conversations stays in the cache by itself. Here a conversation that resumes at its own end
reads neither the window pages nor the partly filled stream page of the system prompt's end: they
would be evicted while every user still relies on them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

# Every turn of a conversation resumes once where the turn before ended, so once is not enough.
VISITS = 2

_junctions: WeakKeyDictionary[BlockPool, Junctions] = WeakKeyDictionary()


class Junctions:
    """How many requests have resumed at a prefix. Bounded: the least recent are forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._is_claimed = False
        self._visits: OrderedDict[BlockHash, int] = OrderedDict()

    @classmethod
    def of(cls, block_pool: BlockPool) -> Junctions:
        """The junctions that belong to a block pool."""
        junctions = _junctions.get(block_pool)
        if junctions is None:
            junctions = _junctions[block_pool] = cls(block_pool.num_gpu_blocks)
        return junctions

    def claim(self) -> bool:
        """Whether the caller is the first to ask: one manager counts visits for all groups."""
        was_claimed, self._is_claimed = self._is_claimed, True
        return not was_claimed

    def visit(self, block_hash: BlockHash) -> None:
        """Count a request that resumes, or could have, behind the block of this hash."""
        self._visits[block_hash] = self._visits.pop(block_hash, 0) + 1
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


def refresh(block_pool: BlockPool, block_hashes: Iterable[BlockHash], group_id: int) -> None:
    """Let cached pages count as just used, so that they are evicted last."""
    for block_hash in block_hashes:
        pages = block_pool.get_cached_block(block_hash, [group_id])
        if pages is not None:
            block_pool.touch(pages)
            block_pool.free_blocks(pages)
