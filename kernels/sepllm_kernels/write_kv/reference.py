"""Reference of ``write_kv``: one token at a time."""

from __future__ import annotations

import torch

from sepllm_kernels.batch import PagedKV
from sepllm_kernels.rotate_queries.reference import rotate


def write_kv_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: PagedKV,
    window_slots: torch.Tensor,
    stream_slots: torch.Tensor,
    stream_cos_sin: torch.Tensor | None = None,
    is_neox: bool = True,
) -> None:
    """Write the keys and values of a step to their window slots, and of kept tokens to the stream.

    Args:
        key, value: ``[num_tokens, num_kv_heads, head_size]``.
        pages: written. FP8 pages take elements divided by their scale, rounded to nearest and
            limited to the largest finite one.
        window_slots, stream_slots: ``[num_tokens]`` int64, ``page * page_size + entry``; below 0 is
            nowhere.
        stream_cos_sin: ``[num_tokens, rotary_dim]`` float32, what the stream's copy of the key is
            rotated by, see :func:`rotate`; ``None`` is nothing.
        is_neox: see :func:`rotate`.
    """
    for token in range(window_slots.shape[0]):
        own = key[token]
        rotated = own if stream_cos_sin is None else rotate(own, stream_cos_sin[token], is_neox)
        for slot, copied in ((window_slots[token], own), (stream_slots[token], rotated)):
            if slot < 0:
                continue
            page, entry = divmod(int(slot), pages.page_size)
            pages.key[page, :, entry] = stored(copied, pages.key_scale, pages.key.dtype)
            pages.value[page, :, entry] = stored(value[token], pages.value_scale, pages.value.dtype)


def stored(elements: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Elements as pages of ``dtype`` hold them."""
    if dtype.itemsize > 1:
        return elements.to(dtype)
    limit = torch.finfo(dtype).max
    return (elements.float() / scale).clamp(-limit, limit).to(dtype)
