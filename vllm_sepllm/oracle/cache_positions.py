"""Cache positions as an oracle: each query rebuilds its own cache and numbers it from 0.

Slow and plain on purpose. Uses no code of the engine and none of the kernels, and none of the
arithmetic by which they get along without rebuilding anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_sepllm.oracle.dense_mask import KeptAfter, sepllm_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_ROWS = 64
_ATTENTION = "sepllm_cache_positions"


def rotated(
    vectors: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, is_neox: bool
) -> torch.Tensor:
    """Apply rotary embeddings (RoFormer, arXiv 2104.09864, equation 34).

    Args:
        vectors: ``[num_rows, num_entries, num_heads, head_size]``.
        positions: ``[num_rows, num_entries]``.
        inv_freq: ``[rotary_dim / 2]`` radians per position.
        is_neox: pairs are ``(i, i + rotary_dim / 2)``; otherwise ``(2 i, 2 i + 1)``.

    Returns:
        The same shape and dtype; elements behind ``rotary_dim`` are left.
    """
    angles = positions[..., None, None].double() * inv_freq.double()
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    half = inv_freq.numel()
    rotary, rest = vectors[..., : 2 * half], vectors[..., 2 * half :]
    pairs = rotary.reshape(*rotary.shape[:-1], *((2, half) if is_neox else (half, 2)))
    x, y = pairs.unbind(-2 if is_neox else -1)
    rotated = torch.stack([x * cos - y * sin, x * sin + y * cos], -2 if is_neox else -1)
    return torch.cat([rotated.flatten(-2), rest], -1)


def rebuilt_cache_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
    rotate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Attention in which the keys a query sees are at positions 0, 1, 2 ... in their order, and the
    query is at the last of them, which is its own (StreamingLLM, arXiv 2309.17453, section 3.2).

    Args:
        query: ``[num_tokens, num_heads, head_size]``, not rotated.
        key, value: ``[num_tokens, num_kv_heads, head_size]``, not rotated.
        mask: ``[num_tokens, num_tokens]`` bool; a query sees itself and none after it.
        scale: factor on the logits.
        logits_soft_cap: cap ``c`` of ``c * tanh(logits / c)``; 0 is none.
        rotate: vectors ``[num_rows, num_entries, num_heads, head_size]`` to positions
            ``[num_rows, num_entries]``.

    Returns:
        ``[num_tokens, num_heads, head_size]``.
    """
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for first in range(0, len(query), BLOCK_ROWS):
        seen = mask[first : first + BLOCK_ROWS]
        rows = query[first : first + BLOCK_ROWS]
        size = int(seen.sum(1).max())
        number = seen.long().cumsum(1) - 1  # of each seen key in its row's cache
        cache = torch.zeros(len(rows), size, dtype=torch.long)
        row, token = seen.nonzero(as_tuple=True)
        cache[row, number[row, token]] = token
        last = number[:, -1:]
        entries = torch.arange(size)[None].expand_as(cache)
        rotated = rotate(rows[:, None], last)[:, 0]
        rotated = rotated.reshape(len(rows), -1, group, query.shape[2])
        logits = torch.einsum("rkgd,rckd->rkgc", rotated, rotate(key[cache], entries)) * scale
        if logits_soft_cap:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        logits = logits.masked_fill((entries > last)[:, None, None], float("-inf"))
        result = torch.einsum("rkgc,rckd->rkgd", logits.softmax(-1), value[cache])
        output[first : first + len(rows)] = result.flatten(1, 2)
    return output


@torch.no_grad()
def cache_position_logits(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    separator_ids: Sequence[int],
    num_sink_tokens: int,
    window_size: int,
    *,
    max_separators: int | None = None,
    interval: int | None = None,
    after: KeptAfter | None = None,
    is_neox: bool = True,
) -> torch.Tensor:
    """Logits of a Hugging Face model whose queries number what they see from 0.

    The model is run with every token at position 0, where rotary embeddings change nothing but
    the length of vectors; the rotation is done here. Layers with a sliding window keep it.

    Args:
        model: a causal language model with rotary embeddings; its dtype decides the arithmetic.
        token_ids: ``[num_tokens]``.
        separator_ids, num_sink_tokens, window_size, max_separators, interval, after:
            see :func:`sepllm_mask`.
        is_neox: how the model pairs elements, see :func:`rotated`.

    Returns:
        ``[num_tokens, vocab_size]`` in the model's dtype.
    """
    from transformers import AttentionInterface

    options: dict[str, Any] = {"interval": interval, "max_separators": max_separators}
    options["after"] = after
    mask = sepllm_mask(token_ids, separator_ids, num_sink_tokens, window_size, **options)
    found = [
        m.inv_freq
        for m in model.modules()
        if isinstance(getattr(m, "inv_freq", None), torch.Tensor)
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rotary embeddings in {type(model).__name__}: must be 1")

    def rotate(vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rotated(vectors, positions, found[0], is_neox)

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        seen, width = mask, options.get("sliding_window")
        if width is not None:
            seen = sepllm_mask(token_ids, (), 0, width)
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        sizes = options["scaling"], options.get("softcap") or 0.0
        return rebuilt_cache_attention(query, key, value, seen, *sizes, rotate)[None], None

    AttentionInterface.register(_ATTENTION, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        ids = torch.as_tensor([list(token_ids)])
        output = model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
    finally:
        model.set_attn_implementation(before)
    logits: torch.Tensor = output.logits[0]
    return logits
