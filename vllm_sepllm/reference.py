"""SepLLM as a dense mask: the oracle that everything else is compared with.

Slow and plain on purpose. Uses no code of the engine and none of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sepllm_mask(
    token_ids: Sequence[int], separator_ids: Sequence[int], num_sink_tokens: int, window_size: int
) -> torch.Tensor:
    """Which key each query sees (arXiv 2412.12094, equation 1).

    Args:
        token_ids: ``[num_tokens]`` the whole sequence.
        separator_ids: ids of separator tokens.
        num_sink_tokens: first tokens that stay visible.
        window_size: recent tokens that stay visible, the query's own included.

    Returns:
        ``[num_tokens, num_tokens]`` bool, rows are queries.
    """
    ids = torch.as_tensor(list(token_ids), dtype=torch.long)
    position = torch.arange(len(ids))
    query, key = position[:, None], position[None, :]
    separator = torch.isin(ids, torch.as_tensor(sorted(separator_ids), dtype=torch.long))
    kept = separator | (position < num_sink_tokens)
    return (key <= query) & (kept[None, :] | (key > query - window_size))


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention over an explicit mask, in float32, one query at a time.

    Args:
        query: ``[num_queries, num_heads, head_size]``.
        key: ``[num_keys, num_kv_heads, head_size]``.
        value: ``[num_keys, num_kv_heads, head_size]``.
        mask: ``[num_queries, num_keys]`` bool; every row sees at least one key.
        scale: factor on the logits.
        logits_soft_cap: cap ``c`` of ``c * tanh(logits / c)``; 0 is none.

    Returns:
        ``[num_queries, num_heads, head_size]`` float32.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    values = value.float().repeat_interleave(group, dim=1)
    output = torch.empty(query.shape, dtype=torch.float32)
    for row in range(query.shape[0]):
        seen = mask[row]
        logits = torch.einsum("hd,khd->hk", query[row].float(), keys[seen]) * scale
        if logits_soft_cap:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        output[row] = torch.einsum("hk,khd->hd", logits.softmax(-1), values[seen])
    return output


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel, token_ids: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """Logits of a Hugging Face model under an explicit mask.

    Args:
        model: a causal language model; its dtype decides the arithmetic.
        token_ids: ``[num_tokens]``.
        mask: ``[num_tokens, num_tokens]`` bool.

    Returns:
        ``[num_tokens, vocab_size]`` in the model's dtype.
    """
    bias = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, float("-inf"))
    ids = torch.as_tensor([list(token_ids)])
    logits: torch.Tensor = model(input_ids=ids, attention_mask=bias[None, None]).logits[0]
    return logits


def first_difference(
    model: PreTrainedModel,
    prompt: Sequence[int],
    generated: Sequence[int],
    separator_ids: Sequence[int],
    num_sink_tokens: int,
    window_size: int,
) -> str | None:
    """Where ``generated`` leaves the model's greedy continuation of ``prompt``.

    One forward pass over both suffices: as long as every token so far agrees, the reference's
    own greedy run would have produced the very same input.

    Returns:
        ``None`` when all tokens agree, else one sentence that names step, tokens and margin.
    """
    token_ids = [*prompt, *generated]
    mask = sepllm_mask(token_ids, separator_ids, num_sink_tokens, window_size)
    logits = masked_logits(model, token_ids, mask)[len(prompt) - 1 : -1]
    for step, (row, token) in enumerate(zip(logits.float(), generated, strict=True)):
        best = int(row.argmax())
        if best != token:
            margin = float(row[best] - row[token])
            return f"step {step}: {token} instead of {best}, whose logit is {margin:.3g} higher"
    return None
