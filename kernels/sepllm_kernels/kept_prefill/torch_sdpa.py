"""``kept_prefill`` through torch's scaled dot product attention, a block of rows at a time.

A block of ``m`` rows reads the stream up to its last row's limit and ``window_size - 1 + m``
window entries, so the work follows what is visible, not the length of the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK_ROWS = 256  # measured: 128 to 512 are alike on AVX-512; more wastes masked window pairs


def block_mask(
    stream_limits: torch.Tensor,
    entries: torch.Tensor,
    num_window: int,
    window_size: int,
    stream_starts: torch.Tensor | None = None,
    num_sinks: int = 0,
) -> torch.Tensor:
    """What a block of rows sees of ``[stream, window]``; its rows end the window.

    Args:
        stream_limits: ``[num_rows]`` int, entries.
        entries: ``[num_stream]`` int, entries of the stream given to the block.
        num_window: entries of the window given to the block.
        window_size: tokens.
        stream_starts, num_sinks: see :func:`kept_prefill_reference`.

    Returns:
        ``[num_rows, num_stream + num_window]`` bool.
    """
    num_rows = stream_limits.shape[0]
    own = torch.arange(num_window - num_rows, num_window)[:, None]
    entry = torch.arange(num_window)[None, :]
    stream = entries[None, :] < stream_limits[:, None]
    if stream_starts is not None:
        stream &= (entries < num_sinks)[None, :] | (entries[None, :] >= stream_starts[:, None])
    window = (entry <= own) & (entry > own - window_size)
    return torch.cat([stream, window], dim=1)


def kept_prefill(
    query: torch.Tensor,
    stream_key: torch.Tensor,
    stream_value: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    stream_limits: torch.Tensor,
    window_size: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    masks: dict[int, torch.Tensor] | None = None,
    *,
    stream_starts: torch.Tensor | None = None,
    num_sinks: int = 0,
    stream_query: torch.Tensor | None = None,
    sink_query: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each row to its part of the stream and to its window.

    Arguments and result as :func:`kept_prefill_reference`, the result in the query's dtype.
    ``masks`` keeps the block masks, which do not depend on the layer: pass one dictionary, empty
    at first, for the same rows in all layers of a step, and another one for other rows.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, num_window = window_key.shape[:2]
    masks = {} if masks is None else masks
    output = torch.empty_like(query)
    for first in range(0, num_rows, BLOCK_ROWS):
        stop = min(first + BLOCK_ROWS, num_rows)
        window_stop = num_window - num_rows + stop
        window_first = max(0, window_stop - (stop - first) - window_size + 1)
        limits = stream_limits[first:stop]
        starts = None if stream_starts is None else stream_starts[first:stop]
        num_stream = int(limits[-1])
        # Two slices: without a bound the first is empty and the second begins at 0.
        sinks = 0 if starts is None else min(num_sinks, num_stream)
        low = 0 if starts is None else max(sinks, int(starts[0]))
        if first not in masks:
            entries = torch.cat([torch.arange(sinks), torch.arange(low, num_stream)])
            num_seen = window_stop - window_first
            masks[first] = block_mask(limits, entries, num_seen, window_size, starts, num_sinks)
        spans = (
            (stream_key, stream_value, slice(0, sinks), sink_query),
            (stream_key, stream_value, slice(low, num_stream), stream_query),
            (window_key, window_value, slice(window_first, window_stop), None),
        )
        keys = [key[:, None, seen] for key, _, seen, _ in spans]
        values = [value[:, None, seen] for _, value, seen, _ in spans]

        def rows(queries: torch.Tensor, first: int = first, stop: int = stop) -> torch.Tensor:
            # [rows, heads, size] -> [kv heads, heads per kv head, rows, size]
            grouped = queries[first:stop].reshape(stop - first, num_kv_heads, -1, head_size)
            return grouped.permute(1, 2, 0, 3)

        options = masks[first], scale, logits_soft_cap
        if stream_query is None and sink_query is None:
            out = _attend([rows(query)], [torch.cat(keys, 2)], [torch.cat(values, 2)], *options)
        else:
            queries = [rows(query if own is None else own) for *_, own in spans]
            out = _attend(queries, keys, values, *options)
        output[first:stop] = out.permute(2, 0, 1, 3).reshape(stop - first, num_heads, head_size)
    return output


def _attend(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    mask: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
) -> torch.Tensor:
    """Attention whose keys come in parts, each with a query of its own.

    Args:
        queries: ``[H, G, M, D]`` of each part.
        keys, values: ``[H, 1, N, D]`` of each part.
        mask: ``[M, N]`` bool, over all parts.
        scale, logits_soft_cap: of the logits.
    """
    if logits_soft_cap:
        pairs = zip(queries, keys, strict=True)
        products = [torch.matmul(q.float(), k.float().transpose(-1, -2)) for q, k in pairs]
        logits = torch.cat(products, -1) * scale
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.matmul(weights, torch.cat([v.float() for v in values], 2)).to(queries[0].dtype)
    heads = queries[0].shape[:2]
    keys = [key.expand(*heads, *key.shape[2:]) for key in keys]
    values = [value.expand(*heads, *value.shape[2:]) for value in values]
    if len(queries) == 1:
        return torch.nn.functional.scaled_dot_product_attention(
            queries[0], keys[0], values[0], attn_mask=mask, scale=scale
        )
    masks = torch.split(mask, [key.shape[2] for key in keys], dim=1)
    parts = zip(queries, keys, values, masks, strict=True)
    return _merged([_flash(*part, scale) for part in parts if part[1].shape[2]])


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one part, and the logarithm of its sum of weights, ``[H, G, M]`` float32.

    torch has no public function that gives both on a CPU; this one is what its public function
    for attention calls.
    """
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=bias, scale=scale
    )
    return output, log_sum.masked_fill(~mask.any(1), float("-inf"))


def _merged(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention to all keys from attention to each part of them."""
    log_sums = torch.stack([log_sum for _, log_sum in parts])
    weights = log_sums.softmax(0)[..., None]
    total = sum(w * output.float() for w, (output, _) in zip(weights, parts, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(parts[0][0].dtype)
