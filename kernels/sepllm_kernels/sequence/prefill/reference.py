"""Reference of ``kept_prefill``: float32, one row at a time."""

from __future__ import annotations

import torch


def kept_prefill_reference(
    query: torch.Tensor,
    stream_key: torch.Tensor,
    stream_value: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    stream_limits: torch.Tensor,
    window_size: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    *,
    stream_starts: torch.Tensor | None = None,
    num_sinks: int = 0,
    stream_query: torch.Tensor | None = None,
    sink_query: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each row to its part of the stream and to its window.

    Rows are consecutive positions. Row ``i`` sees stream entries ``[0, stream_limits[i])`` and
    the last ``window_size`` window entries up to its own, which is entry
    ``num_window - num_rows + i`` (SepLLM, arXiv 2412.12094, equation 1). With ``stream_starts``,
    of its stream entries it sees ``[stream_starts[i], stream_limits[i])`` and the first
    ``num_sinks``.

    Args:
        query: ``[num_rows, num_heads, head_size]``.
        stream_key, stream_value: ``[num_kv_heads, num_stream, head_size]``.
        window_key, window_value: ``[num_kv_heads, num_window, head_size]``; the last
            ``num_rows`` entries belong to the rows themselves.
        stream_limits: ``[num_rows]`` int, entries; never decreasing.
        window_size: tokens, the row's own included.
        scale: factor on the logits.
        logits_soft_cap: cap ``c`` of ``c * tanh(logits / c)``; 0 is none.
        stream_starts: ``[num_rows]`` int, entries; never decreasing.
        num_sinks: entries; only with ``stream_starts``.
        stream_query, sink_query: like ``query``, the same queries as they meet the stream's keys
            and, with ``stream_starts``, those of the sinks (in cache positions they are rotated to
            other angles); ``None`` is ``query`` itself.

    Returns:
        ``[num_rows, num_heads, head_size]`` float32.
    """
    num_rows, num_heads, _ = query.shape
    group = num_heads // stream_key.shape[0]
    before = window_key.shape[1] - num_rows
    output = torch.empty(query.shape, dtype=torch.float32)
    for row in range(num_rows):
        limit, last = int(stream_limits[row]), before + row
        first = max(0, last - window_size + 1)
        seen = torch.arange(limit)
        if stream_starts is not None:
            seen = seen[(seen < num_sinks) | (seen >= stream_starts[row])]
        sinks = int((seen < num_sinks).sum()) if stream_starts is not None else 0
        value = torch.cat([stream_value[:, seen], window_value[:, first : last + 1]], 1).float()
        value = value.repeat_interleave(group, 0)
        parts = (
            (sink_query, stream_key[:, seen[:sinks]]),
            (stream_query, stream_key[:, seen[sinks:]]),
            (query, window_key[:, first : last + 1]),
        )
        logits = torch.cat(
            [
                torch.einsum(
                    "hd,hkd->hk",
                    (query if own is None else own)[row].float(),
                    key.float().repeat_interleave(group, 0),
                )
                for own, key in parts
            ],
            dim=1,
        )
        logits = logits * scale
        if logits_soft_cap:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        output[row] = torch.einsum("hk,hkd->hd", logits.softmax(-1), value)
    return output
