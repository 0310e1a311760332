"""``write_kv`` in Triton: both copies in one pass, a program per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import PagedKV
from sepllm_kernels.rotate_queries.triton import rotate_elements


@triton.jit
def _stored(elements, inverse_scale, LIMIT: tl.constexpr, dtype: tl.constexpr):
    if LIMIT > 0:
        scaled = elements.to(tl.float32) * inverse_scale
        scaled = tl.maximum(scaled, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(scaled, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    return elements.to(dtype)


@triton.jit
def _write_kv(
    key,
    value,
    key_pages,
    value_pages,
    window_slots,
    stream_slots,
    stream_cos_sin,
    key_stride,
    value_stride,
    page_stride,
    head_stride,
    entry_stride,
    inverse_key_scale,
    inverse_value_scale,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,  # pairs that are rotated; 0 is no rotation
    NEOX: tl.constexpr,
    LIMIT: tl.constexpr,  # largest element of FP8 pages; 0 for others
):
    token = tl.program_id(0).to(tl.int64)
    window_slot, stream_slot = tl.load(window_slots + token), tl.load(stream_slots + token)
    flat = tl.arange(0, triton.next_power_of_2(NUM_HEADS * HEAD_SIZE))
    valid = flat < NUM_HEADS * HEAD_SIZE
    head, dim = flat // HEAD_SIZE, flat % HEAD_SIZE
    in_page = head.to(tl.int64) * head_stride + dim
    own_key = tl.load(key + token * key_stride + flat, mask=valid, other=0.0)
    own_value = tl.load(value + token * value_stride + flat, mask=valid, other=0.0)
    dtype: tl.constexpr = key_pages.dtype.element_ty
    stored_key = _stored(own_key, inverse_key_scale, LIMIT, dtype)
    stored_value = _stored(own_value, inverse_value_scale, LIMIT, dtype)
    if window_slot >= 0:
        at = window_slot // PAGE * page_stride + window_slot % PAGE * entry_stride + in_page
        tl.store(key_pages + at, stored_key, mask=valid)
        tl.store(value_pages + at, stored_value, mask=valid)
    if stream_slot >= 0:
        at = stream_slot // PAGE * page_stride + stream_slot % PAGE * entry_stride + in_page
        if HALF > 0:
            cos_sin = stream_cos_sin + token * 2 * HALF
            rotated = rotate_elements(
                key + token * key_stride, cos_sin, flat, dim, valid, HALF, NEOX
            )
            stored_key = _stored(rotated, inverse_key_scale, LIMIT, dtype)
        tl.store(key_pages + at, stored_key, mask=valid)
        tl.store(value_pages + at, stored_value, mask=valid)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: PagedKV,
    window_slots: torch.Tensor,
    stream_slots: torch.Tensor,
    stream_cos_sin: torch.Tensor | None = None,
    is_neox: bool = True,
) -> None:
    """Write the keys and values of a step to their window slots, and of kept tokens to the stream.

    Arguments as :func:`write_kv_reference`; of a token of ``key`` and ``value`` the elements follow
    each other.
    """
    num_tokens, (num_heads, head_size) = window_slots.shape[0], key.shape[1:]
    if num_tokens == 0:
        return
    is_fp8 = pages.key.dtype.itemsize == 1
    page_stride, head_stride, entry_stride, _ = pages.key.stride()
    _write_kv[(num_tokens,)](
        key,
        value,
        pages.key,
        pages.value,
        window_slots,
        stream_slots,
        key if stream_cos_sin is None else stream_cos_sin,
        key.stride(0),
        value.stride(0),
        page_stride,
        head_stride,
        entry_stride,
        1.0 / pages.key_scale,
        1.0 / pages.value_scale,
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        PAGE=pages.page_size,
        HALF=0 if stream_cos_sin is None else stream_cos_sin.shape[1] // 2,
        NEOX=is_neox,
        LIMIT=torch.finfo(pages.key.dtype).max if is_fp8 else 0.0,
    )
