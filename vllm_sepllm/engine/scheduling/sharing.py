"""Prompts that are equal, or begin alike, and come together.

Pages of the stream are found from the step on that follows the one which computes them
(``kept_manager.py``). So such prompts, samples of one prompt for example, would each be computed
and held whole. Here one of them is computed, and the others wait for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, resolve_block_hashes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.progress import ProgressScheduler

# A request is passed over for the tokens of those that wait in so many steps at most: with
# priorities there may be new ones in each.
MOST_PASSED_OVER = 8


@dataclass
class Reserved:
    """What those that wait in one step keep from the ones behind them, and what these get.

    Attributes:
        waiting_for: tokens found of each prompt that waits, by its last block.
        pages: that those which wait will need.
        left: tokens of this step that nobody has yet, at least.
        behind: tokens of the next step that go to requests which started behind.
    """

    waiting_for: dict[BlockHash, int] = field(default_factory=dict)
    pages: int = 0
    left: int = 0
    behind: int = 0


class SharingScheduler(ProgressScheduler):
    """vLLM's scheduler, in which a request waits for the prefix that another one computes.

    Step by step: in the next one it has found what was computed in this one. It waits again only
    if it has found more since. Those behind it in the queue get what it leaves of rows, pages and
    tokens, as if it had started.
    """

    max_num_active_reqs: int
    prefill_capacity_bound: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefixes = PoolState.of(self.kv_cache_manager.block_pool).prefixes
        self._waited: dict[str, int] = {}  # tokens that a request had found when it waited last
        self._reserved = Reserved()
        self._behind: set[str] = set()  # requests that started behind those that wait
        self._passed_over: Counter[str] = Counter()  # steps, by requests behind those that wait
        self._num_requests = 0  # when the step began

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's, see :meth:`_ec_transfer_pending`."""
        self._prefixes.step_starts()
        self._num_requests = sum(self.get_request_counts())
        most, self._reserved = self.max_num_active_reqs, Reserved()
        try:
            output: SchedulerOutput = super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = most
        for name in self._passed_over.keys() & output.num_scheduled_tokens.keys():
            del self._passed_over[name]
        is_full = output.total_num_scheduled_tokens >= self.max_num_scheduled_tokens
        if self._reserved.waiting_for:  # they have their turn in the next step, whatever it is for
            self.prefill_capacity_bound = True
        elif not (is_full or output.preempted_req_ids):  # else nobody that waits was looked at
            self._behind.clear()
        return output

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[Any, int, int, bool]:
        """vLLM's, but one search is enough for equal prompts that wait."""
        if self._reserved.waiting_for and request.block_hashes:
            num_found = self._reserved.waiting_for.get(request.block_hashes[-1])
            if num_found is not None and self._is_being_computed(request, num_found):
                return self.kv_cache_manager.empty_kv_cache_blocks, num_found, 0, False
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request whose turn it is waits for the next step. vLLM asks this for connectors
        that are refused at start-up, when it knows how much of the prompt was found."""
        name = request.request_id
        if self._is_being_computed(request, num_computed_tokens):
            self._reserve(request)
            self._waited[name] = num_computed_tokens
            self._reserved.waiting_for[request.block_hashes[-1]] = num_computed_tokens
            self.max_num_active_reqs -= 1  # its row
            return True
        if self._reserved.waiting_for and not self._may_start(request, num_computed_tokens):
            self.max_num_active_reqs = 0  # nor does anybody else in this step
            return True
        return False

    def _reserve(self, request: Request) -> None:
        """Keep what a request will need that begins to wait."""
        if not self._reserved.waiting_for:
            self._reserved.left = self.max_num_scheduled_tokens
            for other in self.running:
                tokens = other.num_tokens + other.num_output_placeholders
                tokens = max(1 + self.num_spec_tokens, tokens - other.num_computed_tokens)
                self._take_tokens(tokens, other.request_id in self._behind)
        if request.block_hashes[-1] in self._reserved.waiting_for:
            # It shares those reserved for an equal prompt, but for the last one of each group: a
            # copy if it is appended to, and one for what comes behind.
            self._reserved.pages += 2 * len(self.kv_cache_manager.coordinator.single_type_managers)
        else:
            self._reserved.pages += self._pages_wanted(request)

    def _may_start(self, request: Request, num_found: int) -> bool:
        """Whether a request may start behind those that wait. They must find their pages in the
        next step, and half of its tokens."""
        cache = self.kv_cache_manager
        num_free = cache.block_pool.get_num_free_blocks() - cache.watermark_blocks
        if self._pages_wanted(request) > num_free - self._reserved.pages:
            return False
        name, before = request.request_id, replace(self._reserved)
        allowed = max(1, self.max_num_scheduled_tokens // 2, before.behind)
        self._take_tokens(request.num_tokens - num_found, is_behind=True)
        if self._reserved.behind > allowed and self._passed_over[name] < MOST_PASSED_OVER:
            self._reserved = before
            self._passed_over[name] += 1
            return False
        self._behind.add(name)
        return True

    def _take_tokens(self, num_tokens: int, is_behind: bool) -> None:
        """Give a request with so many tokens to compute those that it gets of this step, and those
        of the next one if it counts among the ones behind."""
        most = self.max_num_scheduled_tokens
        threshold = self.scheduler_config.long_prefill_token_threshold
        if threshold:
            is_adaptive = self.scheduler_config.long_prefill_token_threshold_adaptive
            share = most // self._num_requests if is_adaptive else 0
            most = min(most, max(threshold, share))
        taken = max(0, min(num_tokens, most, self._reserved.left))
        self._reserved.left -= taken
        if is_behind:
            self._reserved.behind += min(num_tokens - taken, most)

    def _pages_wanted(self, request: Request) -> int:
        """Free pages that vLLM wants to see before it starts a request, had it found nothing."""
        name = request.request_id
        chunk = self._chunks.get(name, self.scheduler_config.max_num_batched_tokens)
        return self._admission.pages_needed(name, self._num_tokens(request), chunk)

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
        self._start_anew(request)
        super()._preempt_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM's; what those that wait had found is gone."""
        self._waited.clear()
        return bool(super().reset_prefix_cache(*args, **kwargs))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._start_anew(request)
        self._passed_over.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _start_anew(self, request: Request) -> None:
        """Forget what a request that has lost its pages had found, and when it started."""
        self._waited.pop(request.request_id, None)
        self._behind.discard(request.request_id)
