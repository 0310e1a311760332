"""vLLM's GPU worker, with kept tokens counted on the device."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_sepllm.engine.gpu.counts import DeviceCounts
from vllm_sepllm.engine.worker.worker import SepLLMWorker


class DeviceTokenWorker(SepLLMWorker):
    """What a worker that runs the GPU backend adds, whichever device it runs on."""

    def replace_model_state(self) -> None:
        """Have the V2 runner's builders find token ids."""
        from vllm_sepllm.engine.gpu.model_state import SepLLMGPUModelState

        SepLLMGPUModelState.replace(self.model_runner)

    def make_counts(self) -> DeviceCounts:
        """Counts of what a step needs, for the V1 runner."""
        return DeviceCounts.of(self.vllm_config, self.device)


class SepLLMGPUWorker(DeviceTokenWorker, Worker):
    """Set as ``worker_cls`` at start-up when the SEPLLM backend is selected on CUDA."""
