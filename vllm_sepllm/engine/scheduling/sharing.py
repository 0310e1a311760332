"""Prompts that are equal, or begin alike, and come together.

Pages of the stream are found from the step on that follows the one which computes them
(``kept_manager.py``). So such prompts, samples of one prompt for example, would each be computed
and held whole. Here one of them is computed, and the others wait for it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.progress import ProgressScheduler


class SharingScheduler(ProgressScheduler):
    """vLLM's scheduler, in which a request waits for the prefix that another one computes.

    Step by step: in the next one it has found what was computed in this one. It waits again only
    if it has found more since, so it loses a step at most. Those behind it in the queue get what
    it leaves, as if it had started.
    """

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefixes = PoolState.of(self.kv_cache_manager.block_pool).prefixes
        self._waited: dict[str, int] = {}  # tokens that a request had found when it waited last
        self._reserved = 0  # pages, for those that wait in this step

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's, see :meth:`_ec_transfer_pending`."""
        self._prefixes.step_starts()
        most, self._reserved = self.max_num_active_reqs, 0
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = most

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request whose turn it is waits for the next step. vLLM asks this for connectors
        that are refused at start-up, when it knows how much of the prompt was found."""
        waits = self._is_being_computed(request, num_computed_tokens)
        if waits:
            self._waited[request.request_id] = num_computed_tokens
            self.max_num_active_reqs -= 1  # its row
        if waits or self._reserved:
            needed = self._admission.pages_needed(request.request_id, self._num_tokens(request))
            if waits:
                self._reserved += needed
            elif needed > self.kv_cache_manager.block_pool.get_num_free_blocks() - self._reserved:
                self.max_num_active_reqs = 0  # nobody else starts in this step
                return True
        return waits

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

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._waited.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)
