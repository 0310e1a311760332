"""Reference of attention over pages, ``kept_decode`` and ``kept_prefill`` alike: float32, one
request and one row at a time."""

from __future__ import annotations

import torch

from sepllm_kernels.batch import KeptBatch, PagedKV


def read_entries(
    pages: torch.Tensor, table: torch.Tensor, entries: torch.Tensor, scale: float
) -> torch.Tensor:
    """Entries of one request, ``[num_entries, num_kv_heads, head_size]`` float32."""
    page_size = pages.shape[2]
    found = [pages[int(table[e // page_size]), :, e % page_size] for e in entries.tolist()]
    if not found:
        return torch.zeros(0, pages.shape[1], pages.shape[3], device=pages.device)
    return torch.stack([x.float() for x in found]) * scale


def kept_attention_reference(
    queries: torch.Tensor,
    pages: PagedKV,
    batch: KeptBatch,
    output: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
) -> None:
    """Attend each token to what it sees of its request (SepLLM, arXiv 2412.12094, equation 1).

    Args:
        queries: ``[num_tokens, num_heads, head_size]``; or ``[3, num_tokens, num_heads,
            head_size]``, the same queries rotated for the window, the stream and the sinks; two
            suffice without ``num_sinks``.
        pages: keys and values.
        batch: what each token sees.
        output: ``[num_tokens, num_heads, head_size]``, written; tokens of no request are left.
        scale: factor on the logits.
        logits_soft_cap: cap ``c`` of ``c * tanh(logits / c)``; 0 is none.
    """
    parts = queries if queries.dim() == 4 else queries[None].expand(3, *queries.shape)
    group = queries.shape[-2] // pages.key.shape[1]
    for req in range(batch.seq_lens.shape[0]):
        first, stop = int(batch.query_start[req]), int(batch.query_start[req + 1])
        for token in range(first, stop):
            position = int(batch.seq_lens[req]) - stop + token
            begin, limit = batch.stream_ranges[token].tolist()
            seen = (
                (max(0, position - batch.window_size + 1), position + 1, batch.window_table),
                (begin, limit, batch.kept_table),
                (0, min(batch.num_sinks, limit), batch.kept_table),
            )
            logits, values = [], []
            for part, (low, high, table) in zip(parts, seen, strict=True):
                entries = torch.arange(low, max(low, high))
                key = read_entries(pages.key, table[req], entries, pages.key_scale)
                value = read_entries(pages.value, table[req], entries, pages.value_scale)
                key = key.repeat_interleave(group, 1)
                logits.append(torch.einsum("hd,khd->hk", part[token].float(), key) * scale)
                values.append(value.repeat_interleave(group, 1))
            scores = torch.cat(logits, 1)
            if logits_soft_cap:
                scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
            result = torch.einsum("hk,khd->hd", scores.softmax(-1), torch.cat(values))
            output[token] = result.to(output.dtype)
