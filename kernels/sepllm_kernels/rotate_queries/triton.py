"""``rotate_queries`` in Triton: a program per token and part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import STEP_SIZES


@triton.jit
def rotate_elements(vectors, cos_sin, offsets, dim, valid, HALF: tl.constexpr, NEOX: tl.constexpr):
    """Elements of one token's vectors, each pair rotated.

    ``offsets`` are those of the elements, ``dim`` their place in a vector; ``cos_sin`` holds
    ``HALF`` cosines and as many sines.
    """
    rotary = valid & (dim < 2 * HALF)
    if NEOX:
        pair, is_first = dim % HALF, dim < HALF
        partner = tl.where(is_first, offsets + HALF, offsets - HALF)
    else:
        pair, is_first = dim // 2, dim % 2 == 0
        partner = tl.where(is_first, offsets + 1, offsets - 1)
    own = tl.load(vectors + offsets, mask=valid, other=0.0).to(tl.float32)
    other = tl.load(vectors + partner, mask=rotary, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + pair, mask=rotary, other=1.0)
    sin = tl.load(cos_sin + HALF + pair, mask=rotary, other=0.0)
    return own * cos + tl.where(is_first, -other, other) * sin


@triton.jit(do_not_specialize=STEP_SIZES)
def _rotate_queries(
    query,
    cos_sin,
    output,
    num_tokens,
    token_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,  # pairs that are rotated
    NEOX: tl.constexpr,
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    flat = tl.arange(0, triton.next_power_of_2(NUM_HEADS * HEAD_SIZE))
    valid = flat < NUM_HEADS * HEAD_SIZE
    own = query + token * token_stride
    to = output + (part * num_tokens + token) * NUM_HEADS * HEAD_SIZE + flat
    if part == 0:
        tl.store(to, tl.load(own + flat, mask=valid), mask=valid)
        return
    own_cos_sin = cos_sin + ((part - 1) * num_tokens + token) * 2 * HALF
    result = rotate_elements(own, own_cos_sin, flat, flat % HEAD_SIZE, valid, HALF, NEOX)
    tl.store(to, result.to(output.dtype.element_ty), mask=valid)


def rotate_queries(
    query: torch.Tensor, cos_sin: torch.Tensor, is_neox: bool = True
) -> torch.Tensor:
    """Queries as they are, and rotated.

    Arguments and result as :func:`rotate_queries_reference`. Elements of a token's queries follow
    each other, those of ``cos_sin`` altogether.
    """
    num_tokens, num_heads, head_size = query.shape
    output = torch.empty(1 + cos_sin.shape[0], *query.shape, dtype=query.dtype, device=query.device)
    if num_tokens:
        _rotate_queries[(num_tokens, 1 + cos_sin.shape[0])](
            query,
            cos_sin,
            output,
            num_tokens,
            query.stride(0),
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            HALF=cos_sin.shape[2] // 2,
            NEOX=is_neox,
        )
    return output
