"""``decode_plan`` in plain Python."""

from __future__ import annotations

import torch


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def decode_plan_reference(
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    stream_ranges: torch.Tensor,
    window_size: int,
    num_sinks: int,
    tile: int,
    extra_pieces: int,
    min_tiles: int,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Cut the tiles of each request into as few pieces as are at most of a size with which there
    are no more than ``extra_pieces`` of them beside one for each request. Pieces of a request are
    of equal size.

    Args:
        query_start, seq_lens, stream_ranges, window_size, num_sinks: of the batch, as in
            :class:`sepllm_kernels.batch.KeptBatch`.
        tile: entries of a tile.
        extra_pieces: see above; at least 1.
        min_tiles: of a piece, where there are as many.

    Returns:
        ``[num_reqs]``, tiles of a request's pieces, of which the last may have fewer;
        ``[num_reqs + 1]``, pieces of the requests before each;
        ``[num_reqs]``, of them those of requests with several; ``[num_reqs + extra_pieces]``,
        request of each piece, -1 behind the last.
    """
    starts_at: list[int] = query_start.tolist()
    ranges: list[list[int]] = stream_ranges.tolist()

    def count_tiles(request: int) -> int:
        """Of the sinks, the stream and the window, one after the other."""
        first, last = starts_at[request], starts_at[request + 1] - 1
        if last < first:
            return 0
        low, high, seq_len = ranges[first][0], ranges[last][1], int(seq_lens[request])
        window_low = max(seq_len - (last + 1 - first) - window_size + 1, 0)
        tiles = ceil_div(min(high, num_sinks), tile)
        tiles += max(ceil_div(high, tile) - low // tile, 0)
        return tiles + ceil_div(seq_len, tile) - window_low // tile

    num_reqs = len(seq_lens)
    tiles = [count_tiles(request) for request in range(num_reqs)]
    most = max(ceil_div(sum(tiles), extra_pieces), min_tiles)
    sizes, starts, slots, requests = [], [0], [], []
    taken = 0
    for request, count in enumerate(tiles):
        pieces = ceil_div(count, most)
        sizes.append(ceil_div(count, max(pieces, 1)))
        starts.append(starts[-1] + pieces)
        slots.append(taken)
        taken += pieces if pieces > 1 else 0
        requests += [request] * pieces
    requests += [-1] * (num_reqs + extra_pieces - len(requests))
    return sizes, starts, slots, requests
