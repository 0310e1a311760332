"""How many pages a request needs at most, and in which chunks it fits.

There is one count. With chunks of full size it is what vLLM's own admission asks of an empty pool;
with smaller ones the window groups need less, since their pages are freed chunk by chunk. So a
request is refused only if it does not fit in the smallest chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from vllm_sepllm.engine.scheduling.kept_manager import KeptManager


class Admission:
    """Counts for the requests of one scheduler.

    Args:
        managers: of all KV-cache groups.
        num_pages: pages of the pool that requests can hold.
        max_chunk: tokens of a step.
        num_steps: steps in flight at once.
        has_chunks: a prompt may be computed in several steps.
    """

    def __init__(
        self,
        managers: Sequence[SingleTypeKVCacheManager],
        num_pages: int,
        max_chunk: int,
        num_steps: int,
        has_chunks: bool,
    ) -> None:
        self._managers = managers
        self.num_pages = num_pages
        self._num_steps = num_steps
        smallest = min(max_chunk, max(manager.block_size for manager in managers))
        self._chunks = [max_chunk]
        while has_chunks and self._chunks[-1] > smallest:
            self._chunks.append(max(smallest, self._chunks[-1] // 2))

    def pages_needed(self, request_id: str, num_tokens: int, chunk: int | None = None) -> int:
        """Pages that the first ``num_tokens`` tokens of a request need at once at most.

        Args:
            request_id: of the request.
            num_tokens: of its tokens.
            chunk: tokens computed in one step; ``None`` is the smallest there is.
        """
        in_flight = self._num_steps * (chunk or self._chunks[-1])
        return sum(
            manager.most_pages(request_id, num_tokens, in_flight)
            if isinstance(manager, KeptManager)
            else self._positional_pages(manager, num_tokens, in_flight)
            for manager in self._managers
        )

    def pages_of_ordinary_text(self, num_tokens: int, in_flight: int) -> int:
        """The same of a text that keeps the share of its tokens that memory is planned for."""
        return sum(
            int(manager.kv_cache_spec.expected_pages(num_tokens, in_flight))
            if isinstance(manager, KeptManager)
            else self._positional_pages(manager, num_tokens, in_flight)
            for manager in self._managers
        )

    @staticmethod
    def _positional_pages(
        manager: SingleTypeKVCacheManager, num_tokens: int, in_flight: int
    ) -> int:
        """Pages of a group that holds tokens at their positions, the same way."""
        pages = cdiv(num_tokens, manager.block_size)
        if manager.max_admission_blocks_per_request is None:  # nothing leaves it
            return pages
        spec = manager.kv_cache_spec
        return min(pages, spec.max_admission_blocks_per_request(in_flight, num_tokens))

    def largest_chunk(self, request_id: str, num_tokens: int) -> int | None:
        """Tokens per step with which a request fits into an empty pool; ``None`` if none do."""
        for chunk in self._chunks:
            if self.pages_needed(request_id, num_tokens, chunk) <= self.num_pages:
                return chunk
        return None
