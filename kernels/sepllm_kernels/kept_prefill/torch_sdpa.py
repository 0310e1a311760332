"""``kept_prefill`` through torch's scaled dot product attention, a block of rows at a time.

A block of ``m`` rows reads the stream up to its last row's limit and ``window_size - 1 + m``
window entries, so the work follows what is visible, not the length of the context.
"""

from __future__ import annotations

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
        key, value = (
            torch.cat(
                [stream[:, :sinks], stream[:, low:num_stream], window[:, window_first:window_stop]],
                dim=1,
            )
            for stream, window in ((stream_key, window_key), (stream_value, window_value))
        )
        # [rows, heads, size] -> [kv heads, heads per kv head, rows, size]
        rows = query[first:stop].view(stop - first, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
        out = _attend(rows, key[:, None], value[:, None], masks[first], scale, logits_soft_cap)
        output[first:stop] = out.permute(2, 0, 1, 3).reshape(stop - first, num_heads, head_size)
    return output


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
) -> torch.Tensor:
    """Query ``[H, G, M, D]`` over key and value ``[H, 1, N, D]`` under ``mask`` ``[M, N]``."""
    if not logits_soft_cap:
        shape = (*query.shape[:2], *key.shape[2:])
        return torch.nn.functional.scaled_dot_product_attention(
            query, key.expand(shape), value.expand(shape), attn_mask=mask, scale=scale
        )
    logits = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale
    logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.matmul(weights, value.float()).to(query.dtype)
