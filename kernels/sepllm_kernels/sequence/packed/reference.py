"""Reference of ``packed_attention``: one query at a time, differentiable by torch itself."""

from __future__ import annotations

import torch

from sepllm_kernels.sequence.packed.plan import PackedPlan


def packed_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: PackedPlan,
    scale: float,
) -> torch.Tensor:
    """Attend each token of texts to its window and to its part of the stream of kept tokens.

    (SepLLM, arXiv 2412.12094, equation 1.)

    Args:
        query: ``[num_tokens, num_heads, head_size]``.
        key, value: ``[num_tokens, num_kv_heads, head_size]``; KV head ``i`` is shared by the
            query's heads ``g * i`` to ``g * (i + 1) - 1``, with ``g = num_heads / num_kv_heads``.
        plan: what each token sees.
        scale: factor on the logits.

    Returns:
        ``[num_tokens, num_heads, head_size]`` in the query's dtype.
    """
    group = query.shape[1] // key.shape[1]
    rows = []
    for place in range(plan.num_tokens):
        seen = [torch.arange(int(plan.window_first[place]), place + 1, device=query.device)]
        for first, limit in plan.ranges:
            seen.append(plan.kept[int(first[place]) : int(limit[place])])
        places = torch.cat(seen)
        keys = key[places].repeat_interleave(group, 1)
        values = value[places].repeat_interleave(group, 1)
        weights = (torch.einsum("hd,khd->hk", query[place], keys) * scale).softmax(-1)
        rows.append(torch.einsum("hk,khd->hd", weights, values))
    return torch.stack(rows)
