"""The kept stream of one request, on the scheduler's side."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_sepllm.kept_counts import KeptCounts


@dataclass(eq=False)
class RequestStream:
    """What the manager knows of a request, from its first count until its pages are given back.

    Attributes:
        counts: of its tokens whose ids are known.
        most: tokens known, tokens in flight, and the pages these take at most; as last counted.
        num_shared: with a bound, pages up to its last junction, which other requests resume at.
        has_started: its first step was seen.
        pending: keys of this step's pages: key, page, tokens of the prefix.
    """

    counts: KeptCounts
    most: tuple[int, int, int] | None = None
    num_shared: int = 0
    has_started: bool = False
    pending: list[tuple[BlockHash, KVCacheBlock, int]] = field(default_factory=list)
