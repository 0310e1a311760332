"""Prompts that are equal, or begin alike, and come together.

Pages of the stream are found from the step on that follows the one which computes them
(``kept_manager.py``). So such prompts, samples of one prompt for example, would each be computed
and held whole. Here one of them is computed, and the others wait for it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, resolve_block_hashes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.progress import ProgressScheduler


class SharingScheduler(ProgressScheduler):
    """vLLM's scheduler, in which a request waits for the prefix that another one computes.

    Step by step: in the next one it has found what was computed in this one. It waits again only
    if it has found more since, so it loses a step at most. Those behind it in the queue get the
    rows, pages and tokens that it leaves, as if it had started.
    """

    max_num_active_reqs: int
    prefill_capacity_bound: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefixes = PoolState.of(self.kv_cache_manager.block_pool).prefixes
        self._waited: dict[str, int] = {}  # tokens that a request had found when it waited last
        # Of this step: the tokens found of each prompt that waits, by its last block, and the
        # pages reserved for them.
        self._waiting_for: dict[BlockHash, int] = {}
        self._reserved = 0
        self._behind: set[str] = set()  # requests that started behind those that wait

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's, see :meth:`_ec_transfer_pending`."""
        self._prefixes.step_starts()
        self._waiting_for.clear()
        most, self._reserved = self.max_num_active_reqs, 0
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = most
        if self._waiting_for:  # their prompts have their turn in the next step, not its interval
            self.prefill_capacity_bound = True
        else:
            self._behind.clear()
        return output

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[Any, int, int, bool]:
        """vLLM's, but one search is enough for equal prompts that wait."""
        if self._waiting_for and request.block_hashes:
            num_found = self._waiting_for.get(request.block_hashes[-1])
            if num_found is not None and self._is_being_computed(request, num_found):
                return self.kv_cache_manager.empty_kv_cache_blocks, num_found, 0, False
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request whose turn it is waits for the next step. vLLM asks this for connectors
        that are refused at start-up, when it knows how much of the prompt was found."""
        if self._is_being_computed(request, num_computed_tokens):
            self._reserved += self._pages_missing(request)
            self._waited[request.request_id] = num_computed_tokens
            self._waiting_for[request.block_hashes[-1]] = num_computed_tokens
            self.max_num_active_reqs -= 1  # its row
            return True
        if not self._waiting_for:
            return False
        if self._leaves_room(request, num_computed_tokens):
            self._behind.add(request.request_id)
            return False
        self.max_num_active_reqs = 0  # nobody else starts in this step
        return True

    def _pages_missing(self, request: Request) -> int:
        """Free pages that a request which waits will need, at most."""
        if request.block_hashes[-1] in self._waiting_for:
            # It shares those reserved for an equal prompt, but for the last one of each group: a
            # copy if it is appended to, and one for what comes behind.
            return 2 * len(self.kv_cache_manager.coordinator.single_type_managers)
        return self._pages_wanted(request)

    def _pages_wanted(self, request: Request) -> int:
        """Free pages that vLLM wants to see before it starts a request, had it found nothing."""
        name = request.request_id
        chunk = self._chunks.get(name, self.scheduler_config.max_num_batched_tokens)
        return self._admission.pages_needed(name, self._num_tokens(request), chunk)

    def _leaves_room(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request may start behind those that wait: they must find their pages in the
        next step, and half of its tokens."""
        num_free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if self._pages_wanted(request) > num_free - self._reserved:
            return False
        num_tokens = self._next_chunk(request.num_tokens - num_computed_tokens)
        for name in self._behind & self.requests.keys():
            other = self.requests[name]
            num_tokens += self._next_chunk(other.num_tokens - other.num_computed_tokens)
        return num_tokens <= self.max_num_scheduled_tokens // 2

    def _next_chunk(self, num_tokens: int) -> int:
        """Tokens that a step computes of so many, at most."""
        config = self.scheduler_config
        if config.long_prefill_token_threshold and not config.long_prefill_token_threshold_adaptive:
            return min(num_tokens, config.long_prefill_token_threshold)
        return num_tokens

    def _is_being_computed(self, request: Request, num_found: int) -> bool:
        """Whether another request computes in this step what comes behind the ``num_found`` first
        tokens of this one."""
        if request.num_computed_tokens or request.skip_reading_prefix_cache:
            return False
        name = request.request_id
        if not self._kept_managers or name in self._cold or num_found <= self._waited.get(name, -1):
            return False
        size = self._kept_managers[0].block_size
        next_block = num_found // size
        # The last token is computed in any case.
        if (next_block + 1) * size >= request.num_tokens or not request.block_hashes:
            return False
        hash_size = self.kv_cache_manager.block_pool.hash_block_size
        hashes = resolve_block_hashes(request.block_hashes, hash_size, size)
        return self._prefixes.is_new(hashes[next_block])

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._waited.pop(request.request_id, None)
        super()._preempt_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM's; what those that wait had found is gone."""
        self._waited.clear()
        return bool(super().reset_prefix_cache(*args, **kwargs))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._waited.pop(request.request_id, None)
        self._behind.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)
