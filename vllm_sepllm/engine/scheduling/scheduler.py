"""vLLM's scheduler, with token ids for the kept group, and counts of what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_sepllm.engine.scheduling.kept_manager import KeptManager
from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.sharing import SharingScheduler
from vllm_sepllm.engine.scheduling.spec import check_fingerprint
from vllm_sepllm.engine.scheduling.tally import (
    FULL,
    KEPT,
    OTHER,
    WINDOW,
    Reports,
    put,
)
from vllm_sepllm.engine.scheduling.traffic import TrafficShare
from vllm_sepllm.engine.scheduling.window_manager import WindowManager
from vllm_sepllm.engine.startup.settings import Settings

logger = init_logger(f"vllm.{__name__}")


class SepLLMScheduler(SharingScheduler):
    """Set as ``scheduler_cls`` at start-up when the SEPLLM backend is selected."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = Settings.of(self.vllm_config)
        pool = self.kv_cache_manager.block_pool
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for manager in self._kept_managers:
            check_fingerprint(manager, settings)
            manager.attach(settings.rule, self.requests, self._in_flight_tokens)
            manager.counts_tokens = manager is self._kept_managers[0]
            PoolState.of(pool).prefixes.make_room(self.max_model_len, manager.block_size)
        # With a bound the share says little about memory.
        is_bounded = settings.config.max_separator_tokens is not None
        self._traffic = TrafficShare(None if is_bounded else settings.plan)
        self._reports = Reports(self._tally, ((_kind(manager), manager) for manager in managers))
        self.kv_cache_manager.estimate_cached_tokens = self._num_cached_tokens
        self._warn_of_small_pool()

    def _warn_of_small_pool(self) -> None:
        """Say so if a request of ``max_model_len`` tokens of ordinary text will not fit.

        Start-up accepts every length full attention could serve, but the window pages of a large
        prompt chunk leave less to the stream than such a request needs.
        """
        needed = self._admission.pages_of_ordinary_text(self.max_model_len, self._in_flight_tokens)
        if self._kept_managers and needed > self._admission.num_pages:
            logger.warning(
                "SepLLM attention: %d tokens of ordinary text need about %d KV cache blocks, %d "
                "there are. Such requests are computed in small chunks, and longer ones may end "
                "with an error: give the KV cache more memory, or lower max_num_batched_tokens "
                "(%d) or max_model_len.",
                self.max_model_len,
                needed,
                self._admission.num_pages,
                self.scheduler_config.max_num_batched_tokens,
            )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._kept_managers and request.num_computed_tokens:  # else it was refused at once
            num_kept, num_tokens = self._kept_managers[0].counted(request.request_id)
            if num_tokens and self.log_stats:
                self._tally.shares.append(num_kept / num_tokens)
            warning = self._traffic.add(num_kept, num_tokens)
            if warning is not None:
                logger.warning("%s.", warning)
        return super()._free_request(request, *args, **kwargs)

    @property
    def _is_at_rest(self) -> bool:
        """Whether no step follows until a client sends something; sessions may wait for one."""
        return not self.has_unfinished_requests()

    def _num_cached_tokens(self, request: Request) -> int:
        """Tokens of a request in the prefix cache, for the counts of what was added to it.

        vLLM reads them off the pages. Those of the stream hold keys of many lengths, or there are
        none of them. Every manager knows how many token blocks it has noted.
        """
        managers: Sequence[SingleTypeKVCacheManager]
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return min(m.num_cached_block.get(request.request_id, 0) * m.block_size for m in managers)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, and every now and then what was counted."""
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            if client.scheduler_stats is not None:
                counts = self._reports.report(self._is_at_rest, self._traffic.seen)
                if counts is not None:
                    put(client.scheduler_stats, counts)
        return outputs


def _kind(manager: SingleTypeKVCacheManager) -> str:
    """Of a group: what it holds of a request."""
    if isinstance(manager, KeptManager):
        return KEPT
    if isinstance(manager, WindowManager):
        return WINDOW
    return FULL if isinstance(manager, FullAttentionManager) else OTHER


class SepLLMAsyncScheduler(SepLLMScheduler, AsyncScheduler):
    """Set instead where vLLM schedules asynchronously, as it does by default on CUDA."""
