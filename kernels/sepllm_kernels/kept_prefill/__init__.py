"""Attention of a prompt chunk over the kept stream and the window.

``kept_prefill`` takes tensors and is torch; ``kept_prefill_paged`` takes pages and is Triton.
"""

from sepllm_kernels.kept_prefill.reference import kept_prefill_reference
from sepllm_kernels.kept_prefill.torch_sdpa import kept_prefill
from sepllm_kernels.kept_prefill.triton import kept_prefill_paged

__all__ = ["kept_prefill", "kept_prefill_paged", "kept_prefill_reference"]
