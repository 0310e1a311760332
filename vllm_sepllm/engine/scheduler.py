"""vLLM's scheduler, with token ids for the kept group and an end for requests that never fit.

With full attention vLLM makes sure at start-up that one request of ``max_model_len`` tokens
fits. With SepLLM the pages depend on the text, so a request may outgrow the pool. vLLM would
preempt it and wait for ever; here it ends with an error.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_sepllm.engine.manager import KeptManager
from vllm_sepllm.engine.prefix_index import PrefixIndex
from vllm_sepllm.engine.settings import kept_policy

logger = init_logger(f"vllm.{__name__}")


class SepLLMScheduler(Scheduler):
    """Set as ``scheduler_cls`` at start-up when the SEPLLM backend is selected."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy = kept_policy(self.vllm_config)
        self._managers = self.kv_cache_manager.coordinator.single_type_managers
        self._kept_managers = [m for m in self._managers if isinstance(m, KeptManager)]
        for manager in self._kept_managers:
            manager.attach(policy, self.requests, self._in_flight_tokens)
            index = PrefixIndex.of(self.kv_cache_manager.block_pool)
            index.make_room(self.max_model_len, manager.block_size)
        self._refused: dict[str, str] = {}  # reasons, by request; they end with this step
        self._cold: set[str] = set()  # requests that start without a prefix from the cache
        self._warn_of_small_pool()

    def _warn_of_small_pool(self) -> None:
        """Say so if a request of ``max_model_len`` tokens of ordinary text will not fit.

        Start-up accepts every length full attention could serve, but the window pages of a large
        prompt chunk leave less to the stream than such a request needs.
        """
        needed = 0
        for manager in self._managers:
            if isinstance(manager, KeptManager):
                spec = manager.kv_cache_spec
                needed += spec.expected_pages(self.max_model_len, self._in_flight_tokens)
            else:
                needed += self._positional_pages(manager, self.max_model_len)
        if self._kept_managers and needed > self._usable_pages:
            logger.warning(
                "SepLLM attention: %d tokens of ordinary text need about %d KV cache blocks, %d "
                "there are. Longer requests may end with an error: give the KV cache more memory, "
                "or lower max_num_batched_tokens (%d) or max_model_len.",
                self.max_model_len,
                needed,
                self._usable_pages,
                self.scheduler_config.max_num_batched_tokens,
            )

    @property
    def _in_flight_tokens(self) -> int:
        return int(self.vllm_config.max_in_flight_tokens)

    @property
    def _usable_pages(self) -> int:
        return self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is the null block

    @staticmethod
    def _positional_pages(manager: SingleTypeKVCacheManager, num_tokens: int) -> int:
        """Pages that a group which holds tokens at their positions asks for at admission."""
        return manager.get_num_blocks_to_allocate(
            "", num_tokens, [], 0, 0, num_tokens, apply_admission_cap=True
        )

    def _pages_needed(self, request: Request) -> int:
        """Pages that admission asks of an empty pool, where no prefix is found."""
        num_tokens = min(request.num_tokens, self.max_model_len)
        return sum(
            manager.most_pages(request.request_id, num_tokens)
            if isinstance(manager, KeptManager)
            else self._positional_pages(manager, num_tokens)
            for manager in self._managers
        )

    def add_request(self, request: Request) -> None:
        """Queue a request; one that can never fit ends with the next step.

        vLLM also calls this with the next turn of a streaming session, or its end.
        """
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if is_new:
            self._check_fits(request)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)
        self._check_fits(session)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._check_fits(request)

    def _check_fits(self, request: Request) -> None:
        """Refuse a request that could not be admitted even to an empty pool."""
        self._refused.pop(request.request_id, None)
        needed = self._pages_needed(request)
        if needed > self._usable_pages:
            self._refuse(request, needed)

    def _refuse(self, request: Request, needed: int) -> None:
        self._refused[request.request_id] = (
            f"the {request.num_tokens} tokens of this request need {needed} KV cache blocks "
            f"under SepLLM attention, more than the {self._usable_pages} there are: shorten "
            "it, give the KV cache more memory, or choose fewer separators"
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's; then the pages of this step can be found by the next one."""
        output = super().schedule(*args, **kwargs)
        for manager in self._kept_managers:
            manager.step_is_scheduled()
        if self._cold:
            self._cold -= output.num_scheduled_tokens.keys() | output.finished_req_ids
        # vLLM tries none of those that wait in a step in which it preempts others.
        if not (output.num_scheduled_tokens or self.running or output.preempted_req_ids):
            self._unblock()
        return output

    def _unblock(self) -> None:
        """Help the request that nothing but memory keeps from starting, though nothing runs.

        With full attention that cannot be: vLLM makes sure at start-up that every request fits.
        Here a request may need all pages there are, and then starting behind a prefix can ask for
        more than starting from nothing: pages of the stream that are copied before they are
        appended to, or tokens drafted in the first step. So it starts from nothing. Where turns of
        sessions wait for each other's pages, the last one gives its own back. A request that
        still cannot start never will.
        """
        request = self._first_ready()
        if request is None:
            return
        name, holders = request.request_id, self._ready(self.kv_holding_waiting)
        if name not in self._cold and request.num_computed_tokens == 0:
            self._cold.add(name)
        elif holders:
            self._give_back(holders[-1])
        else:
            needed = self._pages_needed(request)
            # Ids of drafts and of tokens being sampled are not counted among those it needs.
            self._refuse(request, max(needed, self._usable_pages + 1))

    def _first_ready(self) -> Request | None:
        """The request vLLM has just failed to find pages for, if any."""
        is_paused = self.pause_state != PauseState.UNPAUSED
        is_full = self.num_waiting_for_streaming_input >= self.max_num_active_reqs
        if is_paused or is_full or self.deferred_frees:
            return None
        ready = self._ready(self.kv_holding_waiting) or self._ready(self.waiting)
        return ready[0] if ready else None

    def _ready(self, queue: RequestQueue) -> list[Request]:
        """Those of a queue that wait for memory alone, in its order."""
        return [
            request
            for request in queue
            if not self._is_blocked_waiting_status(request.status)
            and (request.drop_stale_output or not request.num_stale_output_tokens)
        ]

    def _give_back(self, session: Request) -> None:
        """Free the pages of a session's turn that waits; it will be computed from its start."""
        self.kv_holding_waiting.remove_request(session)
        self.kv_cache_manager.free(session)
        session.num_computed_tokens = 0
        self._enqueue_waiting_request(session)
        self._check_fits(session)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        if request.request_id in self._cold:
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return super()._get_local_prefix_cache_hit(request)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, then an error output for each request that can never fit."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._refused:
            refused, self._refused = self._refused, {}
            for request in self.finish_requests(refused, RequestStatus.FINISHED_ERROR):
                reason = refused[request.request_id]
                logger.error("Request %s ended: %s.", request.request_id, reason)
                output = EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=reason,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
                client = outputs.setdefault(request.client_index, EngineCoreOutputs())
                client.outputs.append(output)
        return outputs


class SepLLMAsyncScheduler(SepLLMScheduler, AsyncScheduler):
    """Set instead where vLLM schedules asynchronously, as it does by default on CUDA."""
