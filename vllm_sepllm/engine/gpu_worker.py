"""vLLM's GPU worker, with kept tokens counted on the device."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_sepllm.engine import settings
from vllm_sepllm.engine.device_rows import DeviceRows, DeviceRunnerTokens
from vllm_sepllm.engine.gpu_metadata import GPUKeptMetadataBuilder
from vllm_sepllm.engine.worker import SepLLMWorker


class DeviceTokenWorker(SepLLMWorker):
    """What a worker that runs the GPU backend adds, whichever device it runs on."""

    def replace_model_state(self) -> None:
        """Have the V2 runner's builders find token ids."""
        from vllm_sepllm.engine.model_state import SepLLMGPUModelState

        SepLLMGPUModelState.replace(self.model_runner)

    def tell_builders(self, builders: list[Any]) -> None:
        """Have ``builders`` of the V1 runner find token ids."""
        scheduler = self.scheduler_config
        rows = DeviceRows(
            settings.kept_policy(self.vllm_config),
            scheduler.max_num_seqs,
            self.model_config.max_model_len,
            scheduler.max_num_batched_tokens,
            2 * self.vllm_config.num_speculative_tokens,  # of two steps in flight
            self.device,
        )
        self._tokens = DeviceRunnerTokens(rows, self.model_runner)
        for builder in builders:
            if isinstance(builder, GPUKeptMetadataBuilder):
                builder.tokens = self._tokens

    def execute_dummy_batch(self) -> None:
        """Take part in a step of other replicas; requests of this one are left alone."""
        if self.use_v2_model_runner:
            super().execute_dummy_batch()
            return
        self._tokens.is_dummy_run = True
        try:
            super().execute_dummy_batch()
        finally:
            self._tokens.is_dummy_run = False


class SepLLMGPUWorker(DeviceTokenWorker, Worker):
    """Set as ``worker_cls`` at start-up when the SEPLLM backend is selected on CUDA."""
