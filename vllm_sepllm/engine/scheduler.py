"""vLLM's scheduler, with token ids for the kept group and an end for requests that never fit.

With full attention vLLM makes sure at start-up that one request of ``max_model_len`` tokens
fits. With SepLLM the pages depend on the text, so a request may outgrow the pool. vLLM would
preempt it and wait for ever; here it ends with an error.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
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
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._kept_managers = [m for m in managers if isinstance(m, KeptManager)]
        for manager in self._kept_managers:
            manager.attach(policy, self.requests, self._in_flight_tokens)
            index = PrefixIndex.of(self.kv_cache_manager.block_pool)
            index.make_room(self.max_model_len, manager.block_size)
        self._too_large: dict[str, str] = {}
        self._warn_of_small_pool()

    def _warn_of_small_pool(self) -> None:
        """Say so if a request of ``max_model_len`` tokens of ordinary text will not fit.

        Start-up accepts every length full attention could serve, but the window pages of a large
        prompt chunk leave less to the stream than such a request needs.
        """
        needed = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            spec = manager.kv_cache_spec
            if isinstance(manager, KeptManager):
                needed += spec.expected_pages(self.max_model_len, self._in_flight_tokens)
            else:
                needed += self._positional_blocks(manager, self.max_model_len)
        if self._kept_managers and needed > self._usable_blocks:
            logger.warning(
                "SepLLM attention: %d tokens of ordinary text need about %d KV cache blocks, %d "
                "there are. Longer requests may end with an error: give the KV cache more memory, "
                "or lower max_num_batched_tokens (%d) or max_model_len.",
                self.max_model_len,
                needed,
                self._usable_blocks,
                self.scheduler_config.max_num_batched_tokens,
            )

    @property
    def _in_flight_tokens(self) -> int:
        return int(self.vllm_config.max_in_flight_tokens)

    @property
    def _usable_blocks(self) -> int:
        return self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is the null block

    @staticmethod
    def _positional_blocks(manager: SingleTypeKVCacheManager, num_tokens: int) -> int:
        """Blocks of a group that holds tokens at their positions, as admission counts them."""
        blocks = cdiv(num_tokens, manager.block_size)
        return min(blocks, manager.max_admission_blocks_per_request or blocks)

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
        """Note a request that could not be admitted even to an empty pool."""
        num_tokens = min(request.num_tokens, self.max_model_len)
        needed = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, KeptManager):
                needed += manager.most_pages(request.request_id, num_tokens)
            else:
                needed += self._positional_blocks(manager, num_tokens)
        self._too_large.pop(request.request_id, None)
        if needed > self._usable_blocks:
            self._too_large[request.request_id] = (
                f"the {request.num_tokens} tokens of this request need {needed} KV cache blocks "
                f"under SepLLM attention, more than the {self._usable_blocks} there are: shorten "
                "it, give the KV cache more memory, or choose fewer separators"
            )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's; then the pages of this step can be found by the next one."""
        output = super().schedule(*args, **kwargs)
        for manager in self._kept_managers:
            manager.step_is_scheduled()
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, then an error output for each request that can never fit."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._too_large:
            too_large, self._too_large = self._too_large, {}
            for request in self.finish_requests(too_large, RequestStatus.FINISHED_ERROR):
                reason = too_large[request.request_id]
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
