"""Attention of whole texts, differentiable, for training."""

from __future__ import annotations

import torch

from sepllm_kernels.sequence.packed.plan import PackedPlan
from sepllm_kernels.sequence.packed.reference import packed_attention_reference
from sepllm_kernels.sequence.packed.torch_sdpa import packed_attention_torch

__all__ = [
    "PackedPlan",
    "packed_attention",
    "packed_attention_reference",
    "packed_attention_torch",
]


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: PackedPlan, scale: float
) -> torch.Tensor:
    """Attend each token of texts to its window and to its part of the stream of kept tokens.

    Arguments and result as :func:`packed_attention_reference`; what computes it follows from where
    the tensors are.

    Raises:
        ValueError: shapes or types do not fit together, or there is no kernel for the device.
    """
    if key.shape != value.shape or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"queries, keys and values are {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}: keys and values must be alike, and all heads of one size"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"queries, keys and values are of {query.dtype}, {key.dtype} and {value.dtype}: they "
            "must be of one type"
        )
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(f"no kernel for {query.device.type}: use a CPU or a CUDA GPU")
    if query.is_cuda:
        from sepllm_kernels.sequence.packed.triton import packed_attention_triton

        return packed_attention_triton(query, key, value, plan, scale)
    return packed_attention_torch(query, key, value, plan, scale)
