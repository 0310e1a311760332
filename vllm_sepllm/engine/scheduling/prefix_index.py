"""Prefix caching of the kept stream: which pages hold the kept tokens of a known prefix.

vLLM hashes a prompt in blocks of tokens, chained, so a hash names a whole prefix. Pages of the
stream do not line up with those blocks, but how a prefix fills them follows from the text alone:

``kept_count[h]``
    kept tokens in the prefix that ends with the block of hash ``h``;
*done* key of ``h``
    the page which that block completed, if it completed one;
*open* key ``h``
    the page it left partly filled, if it kept a token: entries up to ``kept_count[h]`` are those
    of the prefix, whatever was appended to the page later. Blocks behind it that keep nothing
    leave the same page, so they have no key. A page has as many keys as entries, at most.

::

    token blocks   h1          h2          h3            pages of 4 entries
    kept tokens    3           6           8
    pages          [0 1 2 .]   [0 1 2 3]   [4 5 6 7]
                               [4 5 . .]
    keys           open h1: p0  done h2: p0  done h3: p1
                                open h2: p1

The keys live in vLLM's block pool, which lets one page carry several and drops them all when it
gives the page away. ``kept_count`` is a function of content and can never be stale.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

if TYPE_CHECKING:
    from vllm_sepllm.engine.scheduling.spec import KeptSpec

# A page of the stream serves many token blocks: five or six on English text of 18 % separators.
COUNTS_PER_PAGE = 32
# With a bound on separators a text outgrows the pool, and its pages are found by way of all its
# blocks. So many texts of the full length are remembered, about 250 bytes per block of tokens.
LONG_TEXTS = 4


def done_key(block_hash: BlockHash) -> BlockHash:
    """Key of the page that a token block completed."""
    return BlockHash(block_hash + b"done")


class PrefixIndex:
    """Kept tokens of known prefixes, by the hash of their last token block.

    Bounded: the prefixes that were looked up or stored least recently are forgotten first. A
    forgotten prefix is computed again, never wrong.

    Args:
        num_pages: of the block pool.
    """

    def __init__(self, num_pages: int) -> None:
        self._capacity = COUNTS_PER_PAGE * num_pages
        self._kept_count: OrderedDict[BlockHash, int] = OrderedDict()
        self._continued: set[BlockHash] = set()
        self._new: set[BlockHash] = set()

    def __len__(self) -> int:
        return len(self._kept_count)

    def make_room(self, max_model_len: int, block_size: int) -> None:
        """Remember a few texts of the full length, however small the pool is."""
        self._capacity = max(self._capacity, LONG_TEXTS * cdiv(max_model_len, block_size))

    def store(
        self, block_hash: BlockHash, kept_count: int, before: BlockHash | None = None
    ) -> None:
        """Remember the kept tokens of a prefix, and that it is that of ``before`` and a block."""
        self._new.add(block_hash)
        self._kept_count[block_hash] = kept_count
        self._kept_count.move_to_end(block_hash)
        if before in self._kept_count:
            self._continued.add(before)
        if len(self._kept_count) > self._capacity:
            forgotten, _ = self._kept_count.popitem(last=False)
            self._continued.discard(forgotten)

    def step_starts(self) -> None:
        """vLLM begins to schedule a step."""
        self._new.clear()

    def is_new(self, block_hash: BlockHash) -> bool:
        """Whether the prefix that ends with a block was stored in this step."""
        return block_hash in self._new

    def is_continued(self, block_hash: BlockHash) -> bool:
        """Whether a longer text with this prefix was known."""
        return block_hash in self._continued

    def kept_counts(self, block_hashes: Sequence[BlockHash]) -> list[int]:
        """Kept tokens of the prefixes that end with these blocks of one text, as far as they are
        known. They count as looked up: the text is forgotten from its end."""
        counts = []
        for block_hash in block_hashes:
            count = self._kept_count.get(block_hash)
            if count is None:
                break
            counts.append(count)
        for block_hash in reversed(block_hashes[: len(counts)]):
            self._kept_count.move_to_end(block_hash)
        return counts

    def find(
        self,
        block_hashes: Sequence[BlockHash],
        block_pool: BlockPool,
        group_ids: list[int],
        spec: KeptSpec,
        alignment: int,
    ) -> tuple[list[list[KVCacheBlock]], int]:
        """Pages of the longest prefix whose kept tokens, as far as they will be seen, are cached.

        Args:
            block_hashes: hashes of the token blocks that may be used, in order.
            block_pool: where the keys live.
            group_ids: kept groups to look in; a page must be there for each.
            spec: of the kept group; a token block has as many tokens as a page entries.
            alignment: the prefix must be a multiple of so many tokens.

        Returns:
            Pages of each group and the length of the prefix in tokens; null pages where a bound
            on separators leaves entries unseen. If the last page is partly filled it may only be
            read: copy it before appending.
        """
        block_size = spec.block_size
        is_bounded = spec.max_separator_tokens is not None
        num_sink_pages = spec.seen.num_sink_pages(block_size)
        nothing = [block_pool.null_block] * len(group_ids)
        full: list[list[KVCacheBlock]] = []  # done pages; each one page per group
        lost: list[int] = []  # of those, the ones that are no longer cached
        counts: list[int] = []
        holders: list[int] = []  # of each block, the last one up to it that kept a token
        for block_hash, count in zip(block_hashes, self.kept_counts(block_hashes), strict=False):
            if count // block_size > len(full):
                page = block_pool.get_cached_block(done_key(block_hash), group_ids)
                if page is None:
                    if not is_bounded or len(full) < num_sink_pages:
                        break
                    lost.append(len(full))
                full.append(page or nothing)
            holders.append(holders[-1] if counts and count == counts[-1] else len(counts))
            counts.append(count)
        for i in range(len(counts) - 1, -1, -1):
            if (i + 1) * block_size % alignment:
                continue
            pages = full[: counts[i] // block_size]
            if is_bounded:
                # The window begins inside a block; up to that block's start, fewer are kept.
                before = ((i + 1) * block_size - spec.window_size + 1) // block_size
                limit = counts[before - 1] if before > 0 else 0
                unseen = slice(*spec.seen.unseen_pages(limit, block_size))
                at = bisect_left(lost, unseen.stop)
                if at < len(lost) and lost[at] < len(pages):
                    continue
                pages[unseen] = [nothing] * len(pages[unseen])
            if counts[i] % block_size:
                page = block_pool.get_cached_block(block_hashes[holders[i]], group_ids)
                if page is None:
                    continue
                pages = [*pages, page]
            per_group = [[page[g] for page in pages] for g in range(len(group_ids))]
            return per_group, (i + 1) * block_size
        return [[] for _ in group_ids], 0
