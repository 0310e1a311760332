"""In the place of xformers' attention, which runs on a GPU only. Its masks are its own."""

import torch


def attend_under_bias(query, key, value, attn_bias, scale):
    """What xformers documents of ``memory_efficient_attention_partial``: ``[1, tokens, groups,
    heads, size]`` in and out, and log-sum-exps ``[1, groups, heads, tokens]``."""
    bias = attn_bias.materialize((query.shape[1], key.shape[1]))
    q, k, v = (x[0].permute(1, 2, 0, 3).float() for x in (query, key, value))
    logits = torch.einsum("ghqd,ghkd->ghqk", q, k) * scale + bias
    output = torch.einsum("ghqk,ghkd->qghd", logits.softmax(-1), v)
    return output[None].to(query.dtype), logits.logsumexp(-1)[None]
