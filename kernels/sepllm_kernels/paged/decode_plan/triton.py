"""``decode_plan`` in Triton: one program for a batch, no wait on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sepllm_kernels.batch import STEP_SIZES
from sepllm_kernels.paged.tiles import count_tiles


@dataclass(frozen=True)
class DecodePlan:
    """Pieces of the requests of a batch, the same for all KV heads and layers.

    Attributes:
        tile: entries of a tile.
        max_num_reqs: what there is room for; kernels are compiled for it.
        whole: int32, what follows, one after the other: see :func:`plan_parts`.
        sizes: ``[num_reqs]`` int32, tiles of a request's pieces; its last may have fewer.
        starts: ``[num_reqs + 1]`` int32, pieces of the requests before each.
        slots: ``[num_reqs]`` int32, of them those of requests with several pieces, whose results
            are merged.
        requests: ``[num_reqs + extra pieces]`` int32, request of each piece, -1 behind the last.
    """

    tile: int
    max_num_reqs: int
    whole: torch.Tensor
    sizes: torch.Tensor
    starts: torch.Tensor
    slots: torch.Tensor
    requests: torch.Tensor

    @staticmethod
    def allocate(
        max_num_reqs: int, extra_pieces: int, tile: int, device: torch.device | str
    ) -> DecodePlan:
        """For batches of up to so many requests; CUDA graphs may refer to it.

        There is room for a power of two of them, so that kernels are compiled for few sizes.
        """
        room = max(16, triton.next_power_of_2(max_num_reqs))
        lengths = (room, room + 1, room, room + extra_pieces)
        whole = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
        return DecodePlan(tile, room, whole, *whole.split(lengths)).part(max_num_reqs)

    @property
    def extra_pieces(self) -> int:
        """Beside one for each request."""
        return self.requests.shape[0] - self.slots.shape[0]

    def part(self, num_reqs: int) -> DecodePlan:
        """For a batch of so many."""
        pieces = num_reqs + self.extra_pieces
        return DecodePlan(
            self.tile,
            self.max_num_reqs,
            self.whole,
            self.sizes[:num_reqs],
            self.starts[: num_reqs + 1],
            self.slots[:num_reqs],
            self.requests[:pieces],
        )


@triton.jit
def plan_parts(whole, MAX_REQS: tl.constexpr):
    """Where ``sizes``, ``starts``, ``slots`` and ``requests`` of a :class:`DecodePlan` begin."""
    starts = whole + MAX_REQS
    slots = starts + MAX_REQS + 1
    return whole, starts, slots, slots + MAX_REQS


@triton.jit(do_not_specialize=STEP_SIZES)
def _decode_plan(
    query_start,
    seq_lens,
    stream_ranges,
    sizes,
    starts,
    slots,
    requests,
    num_reqs,
    extra_pieces,
    window_size,
    num_sinks,
    MIN_TILES: tl.constexpr,
    TILE: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    req = tl.arange(0, REQUESTS)
    is_req = req < num_reqs
    first = tl.load(query_start + req, mask=is_req, other=0)
    last = tl.load(query_start + req + 1, mask=is_req, other=0) - 1
    is_req = is_req & (last >= first)
    low = tl.load(stream_ranges + 2 * first, mask=is_req, other=0)
    high = tl.load(stream_ranges + 2 * last + 1, mask=is_req, other=0)
    last_position = tl.load(seq_lens + req, mask=is_req, other=0) - 1
    sinks, _, stream, _, window = count_tiles(
        low, high, last_position - (last - first), last_position, window_size, num_sinks, TILE
    )
    tiles = tl.where(is_req, sinks + stream + window, 0)
    limit = tl.maximum(tl.cdiv(tl.sum(tiles, 0), extra_pieces), MIN_TILES)
    pieces = tl.cdiv(tiles, limit)
    # Pieces of equal size: programs that run side by side then end together.
    tl.store(sizes + req, tl.cdiv(tiles, tl.maximum(pieces, 1)), mask=req < num_reqs)
    ends = tl.cumsum(pieces, 0)
    merged = tl.where(pieces > 1, pieces, 0)
    slot = tl.cumsum(merged, 0) - merged
    tl.store(starts, 0)
    tl.store(starts + req + 1, ends, mask=req < num_reqs)
    tl.store(slots + req, slot, mask=req < num_reqs)
    for piece in range(0, tl.max(pieces, 0)):
        tl.store(requests + ends - pieces + piece, req, mask=piece < pieces)
    total = tl.sum(pieces, 0)
    for behind in range(total, num_reqs + extra_pieces, REQUESTS):
        place = behind + req
        nobody = tl.full([REQUESTS], -1, tl.int32)
        tl.store(requests + place, nobody, mask=place < num_reqs + extra_pieces)


def decode_plan(
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    stream_ranges: torch.Tensor,
    window_size: int,
    num_sinks: int,
    plan: DecodePlan,
    min_tiles: int,
) -> None:
    """Fill a plan for a batch of few tokens per request; see :func:`decode_plan_reference`."""
    num_reqs = seq_lens.shape[0]
    _decode_plan[(1,)](
        query_start,
        seq_lens,
        stream_ranges,
        plan.sizes,
        plan.starts,
        plan.slots,
        plan.requests,
        num_reqs,
        plan.extra_pieces,
        window_size,
        num_sinks,
        MIN_TILES=min_tiles,
        TILE=plan.tile,
        REQUESTS=plan.max_num_reqs,
    )
