"""The same for the platform that vLLM chooses on an AMD Zen CPU with zentorch."""

from __future__ import annotations

from vllm.platforms.zen_cpu import ZenCpuPlatform

from vllm_sepllm.engine.cpu.platform import SepLLMCpuPlatform


class SepLLMZenPlatform(SepLLMCpuPlatform, ZenCpuPlatform):
    """vLLM's platform for Zen below ours, so that it stays as it is for other backends."""
