"""Pages of the kept stream: how many a request needs, and when they go back.

The stream is append-only: the token at position ``p``, if kept, is entry ``kept_prefix[p]``::

    position   0  1  2  3  4  5  6  7  8         a = 2, B = 2, S = {"."}
    token      A  b  .  c  d  .  e  .  f
    entry      0  1  2        3     4
    pages      [0    ][1      ] [2   ]           tokens 0..5 need 2 pages, tokens 0..7 need 3

So a request holds ``ceil(kept / B)`` pages. Tokens whose ids are not known yet (the one being
sampled, drafts) are counted as kept: at most a page too many, never one too few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_sepllm.policy import KeptCounts, KeptPolicy


class KeptManager(SingleTypeKVCacheManager):
    """Manager of the kept group; one per engine, on the scheduler's side.

    :meth:`attach` must be called before the first request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy: KeptPolicy | None = None
        self._requests: Mapping[str, Request] = {}
        self._counts: dict[str, KeptCounts] = {}

    def attach(self, policy: KeptPolicy, requests: Mapping[str, Request]) -> None:
        """Give access to the token ids of requests.

        Args:
            policy: which tokens are kept.
            requests: the scheduler's own mapping of live requests by id.
        """
        self._policy, self._requests = policy, requests

    def num_kept(self, request_id: str, num_tokens: int) -> int:
        """Stream entries that the first ``num_tokens`` tokens of a request take at most."""
        request = self._requests[request_id]
        counts = self._counts.get(request_id)
        if counts is None:
            assert self._policy is not None, "KeptManager.attach was not called"
            counts = self._counts[request_id] = KeptCounts(self._policy)
        if request.num_computed_tokens:
            # Ids at computed positions are final; later ones may have been replaced.
            counts.truncate(request.num_computed_tokens)
        if counts.num_tokens < num_tokens:
            token_ids = request.all_token_ids
            counts.extend(token_ids[counts.num_tokens : min(num_tokens, len(token_ids))])
        return counts.kept(num_tokens)

    def num_pages(self, request_id: str, num_tokens: int) -> int:
        """Pages that the first ``num_tokens`` tokens of a request take at most."""
        return cdiv(self.num_kept(request_id, num_tokens), self.block_size)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages to add so that ``num_tokens`` tokens fit; vLLM asks before it allocates."""
        assert not new_computed_blocks, "the kept stream has no prefix caching yet"
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(0, self.num_pages(request_id, num_tokens) - held)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Take the pages from the pool; returns the new ones."""
        blocks = self.req_to_blocks[request_id]
        missing = self.num_pages(request_id, num_tokens) - len(blocks)
        if missing <= 0:
            return []
        new_blocks = self.block_pool.get_new_blocks(missing)
        blocks.extend(new_blocks)
        return new_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request that ended or was preempted; returns its pages."""
        self._counts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Kept tokens stay visible, so no page of the stream is ever skipped."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """No hits: prefix caching is switched off at start-up."""
        return tuple([] for _ in kv_cache_group_ids), 0
