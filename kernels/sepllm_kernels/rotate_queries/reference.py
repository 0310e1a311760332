"""Reference of ``rotate_queries``, and of a rotation."""

from __future__ import annotations

import torch


def rotate(vectors: torch.Tensor, cos_sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate pairs of elements, as rotary embeddings do (RoFormer, arXiv 2104.09864, equation 34).

    Args:
        vectors: ``[*, head_size]``; the first ``rotary_dim`` elements are rotated.
        cos_sin: ``[rotary_dim]`` float32, cosines of the pairs' angles and then their sines.
        is_neox: pairs are ``(i, i + rotary_dim / 2)``; otherwise ``(2 i, 2 i + 1)``.

    Returns:
        ``[*, head_size]`` float32.
    """
    rotated = vectors.float().clone()
    half = cos_sin.shape[0] // 2
    first = slice(0, half) if is_neox else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if is_neox else slice(1, 2 * half, 2)
    cos, sin = cos_sin[:half], cos_sin[half:]
    x, y = vectors[..., first].float(), vectors[..., second].float()
    rotated[..., first] = x * cos - y * sin
    rotated[..., second] = y * cos + x * sin
    return rotated


def rotate_queries_reference(
    query: torch.Tensor, cos_sin: torch.Tensor, is_neox: bool = True
) -> torch.Tensor:
    """Queries as they are, and rotated.

    Args:
        query: ``[num_tokens, num_heads, head_size]``.
        cos_sin: ``[num_parts, num_tokens, rotary_dim]`` float32, see :func:`rotate`.
        is_neox: see :func:`rotate`.

    Returns:
        ``[1 + num_parts, num_tokens, num_heads, head_size]`` in the query's dtype.
    """
    result = query.new_empty(1 + cos_sin.shape[0], *query.shape)
    result[0] = query
    for part in range(cos_sin.shape[0]):
        for token in range(query.shape[0]):
            result[1 + part, token] = rotate(query[token], cos_sin[part, token], is_neox)
    return result
