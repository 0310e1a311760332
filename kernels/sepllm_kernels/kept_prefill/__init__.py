"""Attention of a prompt chunk over the kept stream and the window."""

from sepllm_kernels.kept_prefill.reference import kept_prefill_reference
from sepllm_kernels.kept_prefill.torch_sdpa import kept_prefill

__all__ = ["kept_prefill", "kept_prefill_reference"]
