"""Attention of a prompt chunk over the kept stream and the window, on tensors."""

from sepllm_kernels.sequence.prefill.reference import kept_prefill_reference
from sepllm_kernels.sequence.prefill.torch_sdpa import kept_prefill

__all__ = ["kept_prefill", "kept_prefill_reference"]
