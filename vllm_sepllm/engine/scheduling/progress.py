"""Requests that need nearly all memory there is.

With full attention vLLM makes sure at start-up that one request of ``max_model_len`` tokens
fits. With SepLLM the pages depend on the text, so a request may outgrow the pool. vLLM would
preempt it and wait for ever; here it ends with an error. What fits only in small chunks, without
drafts or without a prefix from the cache is computed so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_sepllm.engine.scheduling.admission import Admission
from vllm_sepllm.engine.scheduling.kept_manager import KeptManager
from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.sessions import SessionScheduler
from vllm_sepllm.engine.scheduling.tally import LENGTH, MEMORY, POSITIONS
from vllm_sepllm.engine.startup.checks import largest_cache, trained_length
from vllm_sepllm.engine.startup.settings import Settings

logger = init_logger(f"vllm.{__name__}")


class ProgressScheduler(SessionScheduler):
    """vLLM's scheduler, in which no request waits for ever."""

    max_num_scheduled_tokens: int
    scheduler_reserve_full_isl: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pool = self.kv_cache_manager.block_pool
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._kept_managers = [m for m in managers if isinstance(m, KeptManager)]
        self._positional_managers = [m for m in managers if not isinstance(m, KeptManager)]
        self._tally, self._spare = PoolState.of(pool).tally, PoolState.of(pool).spare
        self._admission = Admission(
            managers,
            pool.num_gpu_blocks - 1,  # one is the null block
            self.scheduler_config.max_num_batched_tokens,
            self.vllm_config.max_concurrent_batches,
            self.scheduler_config.enable_chunked_prefill,
        )
        self._num_positions: int | None = None  # of the model, where a text can run past them
        options = Settings.of(self.vllm_config).config
        trained = trained_length(self.vllm_config.model_config)
        grows = options.position_mode == "cache" and largest_cache(options) is None
        if grows and self.max_model_len > trained:
            self._num_positions = trained
        # What a request does not fit into, and the sentence; they end with this step.
        self._refused: dict[str, tuple[str, str]] = {}
        self._cold: set[str] = set()  # requests that start without a prefix from the cache
        self._chunks: dict[str, int] = {}  # tokens per step, of requests that fit in no larger ones
        self._undrafted: set[str] = set()  # requests that have no room for drafts
        self._is_scheduling = False  # else whoever is preempted does not lack pages

    @property
    def _in_flight_tokens(self) -> int:
        return int(self.vllm_config.max_in_flight_tokens)

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
        self._undrafted.discard(session.request_id)
        self._check_fits(session)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """vLLM's; nothing of a step that the request is taken out of can be found."""
        self._spare.forget_uncomputed(request, self._positional_managers)
        super()._preempt_request(request, *args, **kwargs)
        self._check_fits(request)
        if self._is_scheduling and not self.running:  # nobody else took the pages it lacks
            self._take_smaller_chunks(request)
            self._undrafted.add(request.request_id)

    def _check_fits(self, request: Request) -> None:
        """Refuse a request that does not fit into an empty pool, or the model's positions."""
        self._refused.pop(request.request_id, None)
        needed = self._admission.pages_needed(request.request_id, self._num_tokens(request))
        if needed > self._admission.num_pages:
            self._refuse(request, needed)
        elif self._num_positions is not None and self._cache_size(request) > self._num_positions:
            reason = (
                f"the {request.num_tokens} tokens of this request leave {self._cache_size(request)}"
                f" in the cache, more than the {self._num_positions} positions of the model: "
                "shorten it, or have the engine started with max_separator_tokens"
            )
            self._refused[request.request_id] = POSITIONS, reason
        elif request.resumable and request.num_tokens >= self.max_model_len:
            self._refused[request.request_id] = LENGTH, self._too_long(request)

    def _cache_size(self, request: Request) -> int:
        """Places in cache positions that a text takes; all kept groups count alike."""
        return self._kept_managers[0].cache_size(request.request_id, request.num_tokens)

    def _num_tokens(self, request: Request) -> int:
        return min(request.num_tokens, self.max_model_len)

    def _refuse(self, request: Request, needed: int) -> None:
        reason = (
            f"the {request.num_tokens} tokens of this request need {needed} KV cache blocks "
            f"under SepLLM attention, more than the {self._admission.num_pages} there are: shorten "
            "it, give the KV cache more memory, or choose fewer separators"
        )
        self._refused[request.request_id] = MEMORY, reason

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's; then the pages of this step can be found by the next one."""
        self._hold_back(self._refused)
        for name in self._undrafted:
            self.requests[name].spec_token_ids = []
        self._is_scheduling = True
        try:
            with self._in_small_chunks() if self._chunks else nullcontext():
                output: SchedulerOutput = super().schedule(*args, **kwargs)
        finally:
            self._is_scheduling = False
        for manager in self._kept_managers:
            manager.step_is_scheduled()
        if self._cold or self._chunks:
            self._cold -= output.num_scheduled_tokens.keys()
            for name in self._chunks.keys() & output.num_scheduled_tokens.keys():
                if not self.requests[name].is_prefill_chunk:
                    del self._chunks[name]
        # A step that preempts tries none of those that wait. Sessions that stop are listed, too.
        if not (output.num_scheduled_tokens or self.running or output.preempted_req_ids):
            self._unblock()
        return output

    def _take_smaller_chunks(self, request: Request) -> None:
        name, num_tokens = request.request_id, self._num_tokens(request)
        chunk = self._admission.largest_chunk(name, num_tokens)
        if chunk is not None and chunk < self.scheduler_config.max_num_batched_tokens:
            self._tally.small_chunks += name not in self._chunks
            self._chunks[name] = chunk

    @contextmanager
    def _in_small_chunks(self) -> Iterator[None]:
        """While requests that fit in no larger chunks are in their prompt, steps are as small.

        vLLM has no limit of a single request. Its admission counts pages of full chunks.
        """
        most = self.max_num_scheduled_tokens
        reserves = self.scheduler_reserve_full_isl
        theirs = self.running or [request for request in [self._first_ready()] if request]
        chunks = [self._chunks[r.request_id] for r in theirs if r.request_id in self._chunks]
        if chunks:
            self.max_num_scheduled_tokens = min(most, *chunks)
            self.scheduler_reserve_full_isl = False
        try:
            yield
        finally:
            self.max_num_scheduled_tokens = most
            self.scheduler_reserve_full_isl = reserves

    def _unblock(self) -> None:
        """Help the request that nothing but memory keeps from starting, though nothing runs.

        With full attention that cannot be: vLLM makes sure at start-up that every request fits.
        Here a request may need all pages there are. Then starting behind a prefix can ask for
        more than starting from nothing: pages of the stream that are copied before they are
        appended to, or tokens drafted in the first step. And a request that has grown may fit in
        small chunks only. So it starts from nothing, in chunks with which it fits. Where turns of
        sessions wait for each other's pages, the last one gives its own back; a session that waits
        for its user keeps them, as with full attention.
        """
        request = self._first_ready()
        if request is None:
            return
        name, num_tokens = request.request_id, self._num_tokens(request)
        holders = self._ready(self.kv_holding_waiting)
        chunk = self._admission.largest_chunk(name, num_tokens)
        if holders:
            self._give_back(holders[-1])
            self._check_fits(holders[-1])
        elif chunk is not None and name not in self._cold:
            self._cold.add(name)
            self._take_smaller_chunks(request)
        elif chunk is None:
            self._refuse(request, self._admission.pages_needed(name, num_tokens))

    def _first_ready(self) -> Request | None:
        """The request vLLM has just failed to find pages for, if any."""
        is_full = self.num_waiting_for_streaming_input >= self.max_num_active_reqs
        if self.pause_state == PauseState.PAUSED_ALL or is_full or self.deferred_frees:
            return None
        ready = self._ready(self.kv_holding_waiting)
        if not ready and self.pause_state == PauseState.UNPAUSED:
            ready = self._ready(self.waiting)
        return ready[0] if ready else None

    def _ready(self, queue: RequestQueue) -> list[Request]:
        """Those of a queue that wait for memory alone, in its order."""
        return [request for request in queue if self._is_ready(request)]

    def _is_ready(self, request: Request) -> bool:
        is_settled = request.drop_stale_output or not request.num_stale_output_tokens
        return is_settled and not self._is_blocked_waiting_status(request.status)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[Any, int, int, bool]:
        if request.request_id in self._cold:
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """vLLM's; a text that has filled the model's positions ends as at ``max_model_len``."""
        update = super()._update_request_with_output
        if self._num_positions is None:
            return update(request, new_token_ids, *args, **kwargs)
        taken, stopped = [], False
        for token in new_token_ids:  # of several, accepted drafts may fill the positions
            tokens, stopped = update(request, [token], *args, **kwargs)
            taken += tokens
            if not stopped and self._cache_size(request) >= self._num_positions:
                request.status, stopped = RequestStatus.FINISHED_LENGTH_CAPPED, True
            if stopped:
                break
        return taken, stopped

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._cold.discard(request.request_id)
        self._chunks.pop(request.request_id, None)
        self._undrafted.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, then an error output for each request that can never fit."""
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._refused:
            refused, self._refused = self._refused, {}
            for request in self.finish_requests(refused, RequestStatus.FINISHED_ERROR):
                limit, reason = refused[request.request_id]
                self._tally.refused[limit] += 1
                logger.error("Request %.120r ended: %s.", request.request_id, reason)  # any text
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
