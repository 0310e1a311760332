"""Arguments that the kernels of decode and of prompts share."""

from __future__ import annotations

from typing import Any

import torch

from sepllm_kernels.batch import KeptBatch, PagedKV


def batch_arguments(
    queries: torch.Tensor, pages: PagedKV, batch: KeptBatch, scale: float
) -> tuple[Any, ...]:
    """From ``query_start`` to ``value_scale``, in the order of the kernels' parameters.

    Args:
        queries, pages, batch, scale: as of :func:`kept_attention_reference`.
    """
    page_stride, head_stride, entry_stride, _ = pages.key.stride()
    return (
        batch.query_start,
        batch.seq_lens,
        batch.window_table,
        batch.kept_table,
        batch.stream_ranges,
        queries.stride(0) if queries.dim() == 4 else 0,
        queries.stride(-3),
        page_stride,
        head_stride,
        entry_stride,
        batch.window_table.stride(0),
        batch.kept_table.stride(0),
        batch.window_size,
        batch.num_sinks,
        scale * pages.key_scale,
        pages.value_scale,
    )
