"""vLLM's scheduler, with token ids for the kept group and an end for requests that never fit.

With full attention vLLM makes sure at start-up that one request of ``max_model_len`` tokens
fits. With SepLLM the pages depend on the text, so a request of nothing but separators may
outgrow the pool. vLLM would preempt it and wait for ever; here it ends with an error.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_sepllm.engine.manager import KeptManager
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
            manager.attach(policy, self.requests)
        self._too_large: dict[str, str] = {}

    def add_request(self, request: Request) -> None:
        """Queue a request; one that can never fit ends with the next step."""
        super().add_request(request)
        self._check_fits(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._check_fits(request)

    def _check_fits(self, request: Request) -> None:
        needed = self._request_remaining_blocks(request)
        usable = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is the null block
        if needed > usable:
            self._too_large[request.request_id] = (
                f"the {request.num_tokens} tokens of this request need {needed} KV cache blocks "
                f"under SepLLM attention, more than the {usable} there are: shorten it, give the "
                "KV cache more memory, or choose fewer separators"
            )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, then an error output for each request that can never fit."""
        for manager in self._kept_managers:
            manager.step_is_over()
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
