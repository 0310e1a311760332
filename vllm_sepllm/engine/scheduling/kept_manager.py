"""Pages of the kept stream: how many a request needs, and when they go back.

The stream is append-only: the token at position ``p``, if kept, is entry ``kept_prefix[p]``::

    position   0  1  2  3  4  5  6  7  8         a = 2, B = 2, S = {"."}
    token      A  b  .  c  d  .  e  .  f
    entry      0  1  2        3     4
    pages      [0    ][1      ] [2   ]           tokens 0..5 need 2 pages, tokens 0..7 need 3

So a request holds ``ceil(kept / B)`` pages. Tokens whose ids are not known yet (the one being
sampled, drafts) are counted as kept: at most a page too many, never one too few. With a bound on
separators, pages of entries that no query to come sees go back, those with sinks excepted; null
pages take their places.

Pages are shared between requests with the same prefix (``prefix_index.py``). A shared page that
is partly filled is copied before the request that found it appends to it, by vLLM's own path
for such copies. The worker copies before it computes a step, and works through steps in their
order, so a page may be found by any later step than the one that fills it: keys noted while a
step is scheduled wait in ``RequestStream.pending`` until that is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashList,
    KVCacheBlock,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_sepllm.engine.scheduling.eviction import leaving_pages
from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.prefix_index import done_key
from vllm_sepllm.engine.scheduling.request_stream import RequestStream
from vllm_sepllm.engine.scheduling.tally import KEPT
from vllm_sepllm.kept_counts import KeptCounts
from vllm_sepllm.policy import KeepRule


class KeptManager(SingleTypeKVCacheManager):
    """Manager of the kept group; one per engine, on the scheduler's side.

    :meth:`attach` must be called before the first request.

    Attributes:
        counts_tokens: for the metrics. All kept groups hold the same tokens, so one of them counts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known_rule: KeepRule | None = None
        self._requests: Mapping[str, Request] = {}
        self._num_in_flight = 0
        self.counts_tokens = False
        self._streams: dict[str, RequestStream] = {}
        self._pool = PoolState.of(self.block_pool)
        self._asked: tuple[str, int, int] | None = None  # request, tokens and pages, last asked for
        self._scheduling = False
        self._pending: list[RequestStream] = []  # those with keys of this step

    def attach(self, rule: KeepRule, requests: Mapping[str, Request], num_in_flight: int) -> None:
        """Give access to the token ids of requests.

        Args:
            rule: which tokens are kept.
            requests: the scheduler's own mapping of live requests by id.
            num_in_flight: tokens of a request that steps in flight compute at most.
        """
        self._known_rule, self._requests, self._num_in_flight = rule, requests, num_in_flight

    @property
    def _rule(self) -> KeepRule:
        assert self._known_rule is not None, "KeptManager.attach was not called"
        return self._known_rule

    def _stream(self, request_id: str) -> RequestStream:
        stream = self._streams.get(request_id)
        if stream is None:
            stream = self._streams[request_id] = RequestStream(KeptCounts(self._rule))
        return stream

    def _counts(self, request_id: str, num_tokens: int) -> KeptCounts:
        """Counts of a request, of its first ``num_tokens`` tokens as far as their ids are known."""
        request = self._requests[request_id]
        counts = self._stream(request_id).counts
        if request.num_computed_tokens:
            # Ids at computed positions are final; later ones may have been replaced.
            counts.truncate(request.num_computed_tokens)
        if counts.num_tokens < num_tokens:
            token_ids = request.all_token_ids
            counts.extend(token_ids[counts.num_tokens : min(num_tokens, len(token_ids))])
        return counts

    def num_kept(self, request_id: str, num_tokens: int) -> int:
        """Stream entries that the first ``num_tokens`` tokens of a request take at most."""
        return self._counts(request_id, num_tokens).kept(num_tokens)

    def num_pages(self, request_id: str, num_tokens: int) -> int:
        """Pages that the first ``num_tokens`` tokens of a request take at most."""
        return cdiv(self.num_kept(request_id, num_tokens), self.block_size)

    def counted(self, request_id: str) -> tuple[int, int]:
        """Kept tokens, and tokens, of those that a request is known to have behind its sinks."""
        stream = self._streams.get(request_id)
        if stream is None:
            return 0, 0
        counts = stream.counts
        num_sinks = min(self._rule.num_sink_tokens, counts.num_tokens)
        return counts.kept(counts.num_tokens) - num_sinks, counts.num_tokens - num_sinks

    def cache_size(self, request_id: str, num_tokens: int) -> int:
        """Tokens that the last of the first ``num_tokens`` of a request sees, without a bound."""
        first = int(self._rule.window_start(num_tokens - 1))
        return self._counts(request_id, num_tokens).kept(first) + num_tokens - first

    def most_pages(self, request_id: str, num_tokens: int, num_in_flight: int) -> int:
        """Pages that a request holds at most at any time while its tokens are computed.

        Args:
            request_id: of the request.
            num_tokens: of its tokens.
            num_in_flight: tokens of it that steps in flight compute at most.
        """
        pages = self.num_pages(request_id, num_tokens)
        if self._rule.max_separator_tokens is None:
            return pages
        stream = self._streams[request_id]
        return min(pages, stream.most_pages(self._rule, num_in_flight, self.block_size))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Pages to take from the pool so that ``num_tokens`` tokens fit.

        vLLM asks before it allocates. Pages of a prefix found in the cache that nobody holds
        count too, and so does the copy of a partly filled one. Before it admits a request, it
        asks for all its tokens: then pages that leave in between are not needed twice, and the
        copy is not counted, since the page it is made of is free again after one step.
        """
        held = self.req_to_blocks.get(request_id, ())
        pages = self.num_pages(request_id, num_tokens)
        self._asked = request_id, num_tokens, pages
        num_blocks = max(0, pages - len(held) - len(new_computed_blocks))
        if apply_admission_cap:
            present = sum(not page.is_null for page in (*held, *new_computed_blocks))
            most = self.most_pages(request_id, num_tokens, self._num_in_flight) - present
            num_blocks = max(0, min(num_blocks, most))
        if new_computed_blocks:
            num_blocks += self._get_num_evictable_blocks(new_computed_blocks)
            if not apply_admission_cap:
                entries = self.num_kept(request_id, num_local_computed_tokens)
                num_blocks += entries % self.block_size > 0
        return num_blocks

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take part in the pages of a prefix found in the cache."""
        assert num_external_computed_tokens == 0, "KV connectors are refused at start-up"
        blocks = self.req_to_blocks[request_id]
        assert not blocks
        full, tail = divmod(self.num_kept(request_id, num_local_computed_tokens), self.block_size)
        assert len(new_computed_blocks) == full + (tail > 0)
        self.block_pool.touch(new_computed_blocks)
        self._pool.spare.discard(new_computed_blocks)
        blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = num_local_computed_tokens // self.block_size
        self._pool.tally.found[KEPT] += sum(not page.is_null for page in new_computed_blocks)
        behind = max(0, num_local_computed_tokens - self._rule.window_size + 1)
        self._stream(request_id).num_left = behind // self.block_size
        if tail:
            self._partial_hit_reqs[request_id] = (full, new_computed_blocks[-1])

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Take pages from the pool; returns the new ones, a copied one among them."""
        new_blocks: list[KVCacheBlock] = []
        blocks = self.req_to_blocks[request_id]
        asked, self._asked = self._asked, None  # a moment ago, so counting again would be the same
        if asked is not None and asked[:2] == (request_id, num_tokens):
            missing = asked[2] - len(blocks)
        else:
            missing = self.num_pages(request_id, num_tokens) - len(blocks)
        if missing <= 0 and request_id not in self._partial_hit_reqs:
            return new_blocks
        self._pool.spare.make_room(max(0, missing) + (request_id in self._partial_hit_reqs))
        if request_id in self._partial_hit_reqs:
            index, source = self._partial_hit_reqs.pop(request_id)
            new_blocks = self.block_pool.get_new_blocks(1)
            self._apply_cow(request_id, index, source, new_blocks[0])
            self._pool.tally.copies += 1
        if missing > 0:
            added = self.block_pool.get_new_blocks(missing)
            blocks.extend(added)
            new_blocks = new_blocks + added
        return new_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Give back pages whose entries no token from here on sees; none without a bound."""
        rule = self._rule
        stream = self._streams.get(request_id) if self.counts_tokens else None
        if stream is not None and processed_computed_tokens >= stream.leaves_at:
            self._count_left(request_id, stream, processed_computed_tokens)
        if rule.max_separator_tokens is None or not self.req_to_blocks.get(request_id):
            return
        counts = self._counts(request_id, processed_computed_tokens)
        # Where ids are not known yet, fewer are taken for kept: rather a page too late.
        start = int(rule.window_start(processed_computed_tokens))
        limit = int(counts.prefix[min(start, counts.num_tokens)])
        self._remove_blocks_in_range(request_id, *rule.seen.unseen_pages(limit, self.block_size))

    def _count_left(self, request_id: str, stream: RequestStream, num_computed: int) -> None:
        """Count tokens behind the window for the metrics, a block of them at a time."""
        if request_id not in self.req_to_blocks:  # it begins with this step
            return
        stop = max(0, num_computed - self._rule.window_size + 1) // self.block_size
        self._counts(request_id, stop * self.block_size)
        kept, dropped = stream.leave(stop, self.block_size)
        stream.leaves_at = (stream.num_left + 1) * self.block_size + self._rule.window_size - 1
        self._pool.tally.tokens_kept += kept
        self._pool.tally.tokens_dropped += dropped

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        leaving = leaving_pages(self.req_to_blocks.get(request_id, []), first_block, last_block)
        super()._remove_blocks_in_range(request_id, first_block, last_block)
        self._pool.tally.returned[KEPT] += len(leaving)
        stream = self._streams.get(request_id)
        for index, page in reversed(leaving):
            if stream is None or not any(index in pages for pages in stream.lasting):
                self._pool.spare.add(page)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Note the keys of pages that this step's full token blocks touch."""
        request_id, size = request.request_id, self.block_size
        hashes = resolve_block_hashes(request.block_hashes, self.block_pool.hash_block_size, size)
        first = self.num_cached_block.get(request_id, 0)
        stream = self._stream(request_id)
        if not stream.has_started:
            stream.has_started = True
            self._visit_junctions(request_id, hashes, first)
        stop = min(num_tokens // size, len(hashes))
        if stop <= first:
            return
        counts = self._counts(request_id, stop * size)
        kept_prefix = counts.prefix
        pages, pending = self.req_to_blocks[request_id], stream.pending
        self._pending.append(stream)
        for i in range(first, stop):
            before, count = int(kept_prefix[i * size]), int(kept_prefix[(i + 1) * size])
            self._pool.prefixes.store(hashes[i], count, hashes[i - 1] if i else None)
            if count // size > before // size:
                pending.append((done_key(hashes[i]), pages[before // size], (i + 1) * size))
            # A page of its own that holds a prefix which was found has no key yet.
            if count % size and (count > before or not stream.has_keys):
                at = counts.last_kept((i + 1) * size) // size
                pending.append((hashes[at], pages[count // size], (at + 1) * size))
            stream.has_keys = True
        pending[:] = [entry for entry in pending if not entry[1].is_null]  # has left meanwhile
        self.num_cached_block[request_id] = stop
        if not self._scheduling:  # asynchronous scheduling also notes what a past step computed
            self.step_is_scheduled()

    def _visit_junctions(self, request_id: str, hashes: Sequence[BlockHash], found: int) -> None:
        """Keep what others need at the junctions along a prompt, and at its tail.

        These are the partly filled pages of those that the request has passed by a hit of
        ``found`` blocks, and with a bound the pages that a request which resumes there sees.
        """
        ends = self._pool.junctions.among(hashes)
        counts = self._counts(request_id, found * self.block_size)
        for end in ends:
            if end <= found and self._pool.junctions.is_confirmed(hashes[end - 1]):
                at = counts.last_kept(end * self.block_size) // self.block_size
                self._pool.spare.refresh(hashes[at : at + 1], self.kv_cache_group_id)
        if self._rule.max_separator_tokens is not None:
            self._counts(request_id, len(hashes) * self.block_size)
            tail = self._pool.tails.get(request_id, range(0))
            self._streams[request_id].keep(self._rule, ends, tail, self.block_size)

    def new_step_starts(self) -> None:
        """vLLM begins to schedule a step."""
        self._scheduling = True

    def step_is_scheduled(self) -> None:
        """The step is complete and will be computed: later ones may find its pages."""
        self._scheduling = False
        for stream in self._pending:
            for key, page, num_tokens in stream.pending:
                named = make_block_hash_with_group_id(key, self.kv_cache_group_id)
                self.block_pool._insert_block_hash(named, page, num_tokens=num_tokens)
            stream.pending.clear()
        self._pending.clear()

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that ended or was preempted; returns its pages.

        If it is preempted while the step is scheduled, its keys of that step are dropped: the
        pages will not be filled.
        """
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.pending.clear()
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Pages of the longest cached prefix of at most ``max_length`` tokens."""
        assert not drop_eagle_block, "speculative decoding is refused at start-up"
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        hashes = hashes[: max_length // size]
        pages, length = PoolState.of(block_pool).prefixes.find(
            hashes, block_pool, kv_cache_group_ids, kv_cache_spec, alignment_tokens
        )
        return tuple(pages), length
