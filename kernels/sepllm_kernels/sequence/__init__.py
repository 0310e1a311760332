"""Attention of a prompt chunk over the kept stream and the window.

``kept_prefill`` takes tensors and needs nothing but torch. ``kept_prefill_paged`` takes pages; it
is in ``.triton``, which is imported where there is Triton.
"""

from sepllm_kernels.sequence.reference import kept_prefill_reference
from sepllm_kernels.sequence.torch_sdpa import kept_prefill

__all__ = ["kept_prefill", "kept_prefill_reference"]
