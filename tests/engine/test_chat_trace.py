"""Many conversations in little memory: what the prefix cache serves, beside full attention."""

import pytest
from chat_trace import BLOCK_SIZE, ChatTrace, Replay

pytestmark = pytest.mark.engine

MEMORY = 0.25  # of what all conversations need under full attention


@pytest.fixture(scope="module")
def trace():
    return ChatTrace.make(num_users=20)


@pytest.fixture(scope="module")
def full(trace):
    """Blocks, capacity and cached share of full attention."""
    blocks = int(MEMORY * len(trace) / BLOCK_SIZE)
    replay = Replay(trace, None, blocks)
    return blocks, replay.capacity, replay.run()


def test_the_same_bytes_serve_no_less(trace, full):
    blocks, _, share = full
    assert 0.2 < share < 0.7, "memory is not tight"
    for window in (64, 256):
        assert Replay(trace, {"window_size": window}, blocks).run() >= share


def test_the_same_number_of_tokens_serves_nine_tenths(trace, full):
    """As much memory as gives the same capacity in tokens at start-up, a third of the bytes."""
    blocks, capacity, share = full
    options = {"window_size": 64}
    blocks = int(blocks * capacity / Replay(trace, options, blocks).capacity)
    replay = Replay(trace, options, blocks)
    assert replay.capacity <= 1.01 * capacity
    assert replay.run() >= 0.9 * share
