"""Reference of ``write_kv``: one token at a time."""

from __future__ import annotations

import torch

from sepllm_kernels.batch import PagedKV


def rotate(vectors: torch.Tensor, angles: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate pairs of elements, as rotary embeddings do (RoFormer, arXiv 2104.09864, equation 34).

    Args:
        vectors: ``[*, head_size]``; the first ``rotary_dim`` elements are rotated.
        angles: ``[rotary_dim / 2]`` float, radians, one per pair.
        is_neox: pairs are ``(i, i + rotary_dim / 2)``; otherwise ``(2 i, 2 i + 1)``.

    Returns:
        ``[*, head_size]`` float32.
    """
    rotated = vectors.float().clone()
    half = angles.shape[0]
    first = slice(0, half) if is_neox else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if is_neox else slice(1, 2 * half, 2)
    cos, sin = angles.double().cos().float(), angles.double().sin().float()
    x, y = vectors[..., first].float(), vectors[..., second].float()
    rotated[..., first] = x * cos - y * sin
    rotated[..., second] = y * cos + x * sin
    return rotated


def write_kv_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: PagedKV,
    window_slots: torch.Tensor,
    stream_slots: torch.Tensor,
    stream_angles: torch.Tensor | None = None,
    is_neox: bool = True,
) -> None:
    """Write the keys and values of a step to their window slots, and of kept tokens to the stream.

    Args:
        key, value: ``[num_tokens, num_kv_heads, head_size]``.
        pages: written. FP8 pages take elements divided by their scale, rounded to nearest and
            limited to the largest finite one.
        window_slots, stream_slots: ``[num_tokens]`` int64, ``page * page_size + entry``; below 0 is
            nowhere.
        stream_angles: ``[num_tokens, rotary_dim / 2]`` float32, radians that the stream's copy of
            the key is rotated by; ``None`` is none.
        is_neox: see :func:`rotate`.
    """
    for token in range(window_slots.shape[0]):
        own = key[token]
        shifted = own if stream_angles is None else rotate(own, stream_angles[token], is_neox)
        for slot, copied in ((window_slots[token], own), (stream_slots[token], shifted)):
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
