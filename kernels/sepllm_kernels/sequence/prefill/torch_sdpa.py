"""``kept_prefill`` through torch's scaled dot product attention, a block of rows at a time.

A block is cut into tiles, which torch computes in one call. A tile of ``m`` rows reads the stream
up to the last limit of its block and ``window_size - 1 + m`` window entries, so the work follows
what is visible, not the length of the context::

    rows of a block        [ tile 0 | tile 1 | tile 2 | tile 3 ]
    window of tile 0   [...........------]
    window of tile 1            [...........------]             and so on
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BLOCK_ROWS = 256  # rows of one call; the tiles of a block read the same part of the stream


def tile_rows(window_size: int) -> int:
    """Rows of a tile: more would read more of others' windows, fewer copy more keys."""
    return 64 if window_size >= 256 else 32  # measured on AVX2, windows of 64 and 256


def block_mask(
    stream_limits: torch.Tensor,
    entries: torch.Tensor,
    num_window: int,
    window_size: int,
    stream_starts: torch.Tensor | None = None,
    num_sinks: int = 0,
    num_tiles: int = 1,
) -> torch.Tensor:
    """What a block of rows sees of ``[stream, window]``; the rows of a tile end its window.

    Args:
        stream_limits: ``[num_rows]`` int, entries.
        entries: ``[num_stream]`` int, entries of the stream given to the block.
        num_window: entries of the window given to each tile.
        window_size: tokens.
        stream_starts, num_sinks: see :func:`kept_prefill_reference`.
        num_tiles: equal parts of the rows.

    Returns:
        ``[num_rows, num_stream + num_window]`` bool.
    """
    num_rows = stream_limits.shape[0] // num_tiles
    own = torch.arange(num_window - num_rows, num_window)[:, None]
    entry = torch.arange(num_window)[None, :]
    stream = entries[None, :] < stream_limits[:, None]
    if stream_starts is not None:
        stream &= (entries < num_sinks)[None, :] | (entries[None, :] >= stream_starts[:, None])
    window = (entry <= own) & (entry > own - window_size)
    return torch.cat([stream, window.repeat(num_tiles, 1)], dim=1)


@dataclass(frozen=True)
class _Block:
    """Rows ``[first, stop)``, in ``num_tiles`` equal tiles, and window entries that they read."""

    first: int
    stop: int
    num_tiles: int
    window_first: int
    window_stop: int

    @property
    def tile_rows(self) -> int:
        return (self.stop - self.first) // self.num_tiles

    @property
    def num_seen(self) -> int:
        """Window entries of a tile."""
        return self.window_stop - self.window_first - (self.num_tiles - 1) * self.tile_rows

    def query(self, queries: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """``[num_rows, num_heads, head_size]`` as ``[kv heads, tiles, rows of a tile, size]``, the
        heads of a KV head being rows one after the other."""
        shape = self.num_tiles, self.tile_rows, num_kv_heads, -1, queries.shape[2]
        tiles = queries[self.first : self.stop].reshape(shape)
        return tiles.permute(2, 0, 3, 1, 4).flatten(2, 3)

    def output(self, attended: torch.Tensor, num_heads: int) -> torch.Tensor:
        """What :meth:`query` does, undone."""
        num_kv_heads, num_tiles, _, head_size = attended.shape
        tiles = attended.reshape(num_kv_heads, num_tiles, -1, self.tile_rows, head_size)
        return tiles.permute(1, 3, 0, 2, 4).reshape(-1, num_heads, head_size)

    def stream(self, entries: torch.Tensor) -> torch.Tensor:
        """``[kv heads, n, size]`` as ``[kv heads, tiles, n, size]``, the same for all tiles."""
        return entries[:, None].expand(-1, self.num_tiles, -1, -1)

    def window(self, window: torch.Tensor) -> torch.Tensor:
        """The window as ``[kv heads, tiles, num_seen, size]``."""
        part = window[:, self.window_first : self.window_stop]
        return part.unfold(1, self.num_seen, self.tile_rows).transpose(2, 3)

    def bias(self, mask: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
        """A mask of the block as it is added to the logits of ``group`` heads."""
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
        bias = bias.view(1, self.num_tiles, 1, self.tile_rows, -1)
        return bias.expand(-1, -1, group, -1, -1).flatten(2, 3)


def _blocks(num_rows: int, num_window: int, window_size: int) -> Iterator[_Block]:
    first, before = 0, num_window - num_rows
    while first < num_rows:
        rows = min(BLOCK_ROWS, num_rows - first)
        window_first = before + first - window_size + 1
        num_tiles = rows // tile_rows(window_size) if window_first >= 0 else 1
        if num_tiles > 1:  # otherwise rows are too few, or their windows differ in size
            rows = num_tiles * tile_rows(window_size)
        stop = first + rows
        yield _Block(first, stop, max(1, num_tiles), max(0, window_first), before + stop)
        first = stop


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
    ``masks`` keeps what each block of rows sees, a byte for each pair: pass one dictionary, empty
    at first, for the same rows in all layers of a step, and another one for other rows. What is
    added to logits is made of it each time: it is as large for every head of a group, and in their
    type.
    """
    num_rows, num_heads, _ = query.shape
    num_kv_heads, num_window = window_key.shape[:2]
    masks = {} if masks is None else masks
    output = torch.empty_like(query)
    for block in _blocks(num_rows, num_window, window_size):
        limits = stream_limits[block.first : block.stop]
        starts = None if stream_starts is None else stream_starts[block.first : block.stop]
        num_stream = int(limits[-1])
        # Two slices: without a bound the first is empty and the second begins at 0.
        sinks = 0 if starts is None else min(num_sinks, num_stream)
        low = 0 if starts is None else max(sinks, int(starts[0]))
        if block.first not in masks:
            entries = torch.cat([torch.arange(sinks), torch.arange(low, num_stream)])
            sizes = block.num_seen, window_size, starts, num_sinks, block.num_tiles
            masks[block.first] = block_mask(limits, entries, *sizes)
        seen = slice(0, sinks), slice(low, num_stream)
        keys = [block.stream(stream_key[:, part]) for part in seen] + [block.window(window_key)]
        values = [block.stream(stream_value[:, part]) for part in seen]
        values.append(block.window(window_value))
        bias = block.bias(masks[block.first], num_heads // num_kv_heads, query.dtype)
        options = bias, scale, logits_soft_cap
        if stream_query is None and sink_query is None:
            keys, values, own = [torch.cat(keys, 2)], [torch.cat(values, 2)], [query]
        else:
            own = [query if rotated is None else rotated for rotated in (sink_query, stream_query)]
            own.append(query)
        queries = [block.query(rotated, num_kv_heads) for rotated in own]
        attended = _attend(queries, keys, values, *options)
        output[block.first : block.stop] = block.output(attended, num_heads)
    return output


def _attend(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    bias: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
) -> torch.Tensor:
    """Attention whose keys come in parts, each with a query of its own.

    Args:
        queries: ``[H, T, M, D]`` of each part.
        keys, values: ``[H, T, N, D]`` of each part.
        bias: ``[1, T, M, N]``, over all parts; 0 or minus infinity.
        scale, logits_soft_cap: of the logits.
    """
    if logits_soft_cap:
        pairs = zip(queries, keys, strict=True)
        products = [torch.matmul(q.float(), k.float().transpose(-1, -2)) for q, k in pairs]
        logits = torch.cat(products, -1) * scale
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        weights = (logits + bias).softmax(-1)
        return torch.matmul(weights, torch.cat([v.float() for v in values], 2)).to(queries[0].dtype)
    if len(queries) == 1:
        return torch.nn.functional.scaled_dot_product_attention(
            queries[0], keys[0], values[0], attn_mask=bias, scale=scale
        )
    biases = torch.split(bias, [key.shape[2] for key in keys], dim=3)
    parts = zip(queries, keys, values, biases, strict=True)
    return _merged([_flash(*part, scale) for part in parts if part[1].shape[2]])


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one part, and the logarithm of its sum of weights, ``[H, T, M]`` float32.

    torch has no public function that gives both on a CPU; this one is what its public function
    for attention calls.
    """
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=bias, scale=scale
    )
    sees_none = bias.amax(3) == float("-inf")
    return output, log_sum.masked_fill(sees_none, float("-inf"))


def _merged(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention to all keys from attention to each part of them."""
    log_sums = torch.stack([log_sum for _, log_sum in parts])
    weights = log_sums.softmax(0)[..., None]
    total = sum(w * output.float() for w, (output, _) in zip(weights, parts, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(parts[0][0].dtype)
