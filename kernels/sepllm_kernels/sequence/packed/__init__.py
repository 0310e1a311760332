"""Attention of whole texts, differentiable, for training."""

from __future__ import annotations

import torch

from sepllm_kernels.sequence.packed.plan import PackedPlan
from sepllm_kernels.sequence.packed.reference import packed_attention_reference
from sepllm_kernels.sequence.packed.torch_sdpa import packed_attention_torch

__all__ = [
    "PackedPlan",
    "check_gpu_has_kernels",
    "packed_attention",
    "packed_attention_reference",
    "packed_attention_torch",
]

GPU_TYPES = torch.float32, torch.bfloat16, torch.float16
LEAST_HEAD = 16  # elements: tensor cores multiply no fewer


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: PackedPlan, scale: float
) -> torch.Tensor:
    """Attend each token of texts to its window and to its part of the stream of kept tokens.

    Arguments and result as :func:`packed_attention_reference`; what computes it follows from where
    the tensors are.

    Raises:
        ValueError: shapes or types do not fit together, or there is no kernel for the device, or on
            a GPU for the type or the size of heads.
    """
    if key.shape != value.shape or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"queries, keys and values are {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}: keys and values must be alike, and all heads of one size"
        )
    if not query.shape[0] == key.shape[0] == plan.num_tokens:
        raise ValueError(
            f"there are {query.shape[0]} queries and {key.shape[0]} keys for a plan of "
            f"{plan.num_tokens} tokens: all must be as many"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} heads of queries cannot be shared out to {key.shape[1]} of keys: "
            "each must have as many"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"queries, keys and values are of {query.dtype}, {key.dtype} and {value.dtype}: they "
            "must be of one type"
        )
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(f"no kernel for {query.device.type}: use a CPU or a CUDA GPU")
    if query.is_cuda:
        check_gpu_has_kernels(query)
        from sepllm_kernels.sequence.packed.triton import packed_attention_triton

        return packed_attention_triton(query, key, value, plan, scale)
    return packed_attention_torch(query, key, value, plan, scale)


def check_gpu_has_kernels(query: torch.Tensor) -> None:
    """Refuse what a CPU computes and the kernels for GPUs do not.

    Raises:
        ValueError: of this type, or of heads as small as these, there is no kernel.
    """
    if query.dtype not in GPU_TYPES:
        raise ValueError(
            f"queries, keys and values are of {query.dtype}, for which there is no GPU kernel: "
            "use float32, bfloat16 or float16, or a CPU"
        )
    if query.shape[2] < LEAST_HEAD:
        raise ValueError(
            f"heads have {query.shape[2]} elements, and on a GPU they must have {LEAST_HEAD} at "
            "least: use a CPU for so small a model"
        )
