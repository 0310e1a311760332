"""What vLLM calls our backend, and where it finds our classes. Imports nothing."""

BACKEND_NAME = "SEPLLM"
BACKEND_PATH = "vllm_sepllm.engine.gpu.backend.SepLLMGPUBackend"
CPU_PLATFORM_PATH = "vllm_sepllm.engine.cpu.platform.SepLLMCpuPlatform"
ZEN_PLATFORM_PATH = "vllm_sepllm.engine.cpu.zen_platform.SepLLMZenPlatform"
SCHEDULER_PATH = "vllm_sepllm.engine.scheduling.scheduler.SepLLMScheduler"
ASYNC_SCHEDULER_PATH = "vllm_sepllm.engine.scheduling.scheduler.SepLLMAsyncScheduler"
CUDA_PLATFORM_PATH = "vllm_sepllm.engine.gpu.platform.SepLLMCudaPlatform"
