"""``decode_plan`` equals its reference, and its pieces are few and of about one size."""

import itertools

import pytest
import torch
from batches import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from sepllm_kernels.paged.decode_plan import DecodePlan, decode_plan, decode_plan_reference

pytestmark = pytest.mark.kernels

MIN_TILES = 2


def make_batch(requests, window_size, num_sinks):
    """From ``(tokens in the batch, tokens before them, kept share)`` of each request."""
    query_start, seq_lens, ranges = [0], [], []
    for num_tokens, before, share in requests:
        query_start.append(query_start[-1] + num_tokens)
        seq_lens.append(before + num_tokens)
        for position in range(before, before + num_tokens):
            limit = int(share * max(position - window_size + 1, 0))
            ranges.append([min(num_sinks, limit), limit] if num_sinks else [0, limit])
    ranges.append([0, 0])  # never read; a batch of no tokens has a tensor too
    index = {"dtype": torch.int32, "device": DEVICE}
    tensors = (torch.tensor(x, **index) for x in (query_start, seq_lens, ranges))
    return (*tensors, window_size, num_sinks)


def run(batch, tile, extra_pieces, max_num_reqs=None):
    """The plan as its reference returns it."""
    num_reqs = len(batch[1])
    largest = DecodePlan.allocate(max_num_reqs or num_reqs, extra_pieces, tile, DEVICE)
    for tensor in (largest.sizes, largest.starts, largest.slots, largest.requests):
        tensor.fill_(-7)  # of another step
    plan = largest.part(num_reqs)
    decode_plan(*batch, plan, MIN_TILES)
    tensors = plan.sizes, plan.starts, plan.slots, plan.requests
    found = tuple(x.tolist() for x in tensors)
    expected = decode_plan_reference(*batch, tile, extra_pieces, MIN_TILES)
    assert found == expected
    return found


REQUEST = st.tuples(st.integers(0, 8), st.integers(0, 3000), st.floats(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=20),
    st.sampled_from([1, 64, 256]),
    st.sampled_from([0, 4]),
    st.sampled_from([16, 64]),
    st.sampled_from([1, 7, 200]),
)
def test_equals_the_reference(requests, window_size, num_sinks, tile, extra_pieces):
    run(make_batch(requests, window_size, num_sinks), tile, extra_pieces, max_num_reqs=25)


def test_nobody_has_tokens():
    sizes, starts, slots, requests = run(make_batch([(0, 9, 0.5)] * 3, 64, 0), 16, 5)
    assert (sizes, starts, slots, requests) == ([0] * 3, [0] * 4, [0] * 3, [-1] * 8)


def test_one_long_request_among_short_ones():
    """It is cut, so that no program has more than a share of it; the short ones stay whole."""
    requests = [(1, 500, 0.2)] * 20 + [(1, 100_000, 0.2)] + [(1, 500, 0.2)] * 10
    sizes, starts, slots, _ = run(make_batch(requests, 256, 0), 64, 40)
    pieces = [stop - start for start, stop in itertools.pairwise(starts)]
    # 312 tiles and 4 of its window, 30 times 1 and 5: half of a fortieth of all
    assert sizes[20] == 13
    assert pieces == [1] * 20 + [25] + [1] * 10
    assert slots[20:22] == [0, 25]


@pytest.mark.parametrize("num_reqs", [1, 64, 400])
def test_pieces_of_equal_requests(num_reqs):
    sizes, starts, _, requests = run(make_batch([(1, 20_000, 0.2)] * num_reqs, 256, 0), 64, 99)
    tiles = 20_000 // 5 // 64 + 5
    assert starts[-1] <= num_reqs + 99
    assert sum(request >= 0 for request in requests) == starts[-1]
    assert max(sizes) <= max(MIN_TILES, tiles * num_reqs // 99 + 1)
    pieces = starts[1]
    assert (pieces - 1) * sizes[0] < tiles <= pieces * sizes[0]
    assert pieces * sizes[0] - tiles < pieces, "equal, but for what does not divide"
