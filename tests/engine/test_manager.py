"""The kept group's manager over vLLM's real block pool."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_kept_manager
from vllm.v1.core.block_pool import BlockPool

from vllm_sepllm.policy import SepLLMPolicy, separator_table

pytestmark = pytest.mark.engine

SEPARATOR, WORD = 1, 2


class Setup:
    def __init__(self, num_blocks=50, block_size=4, sinks=2):
        self.pool = BlockPool(num_blocks, enable_caching=False, hash_block_size=block_size)
        self.manager = make_kept_manager(self.pool, sinks)
        self.requests = {}
        policy = SepLLMPolicy(sinks, 8, separator_table([SEPARATOR], 10))
        self.manager.attach(policy, self.requests)

    def request(self, name, token_ids, computed=0):
        self.requests[name] = SimpleNamespace(
            request_id=name, all_token_ids=list(token_ids), num_computed_tokens=computed
        )
        return self.requests[name]

    def allocate(self, name, num_tokens):
        asked = self.manager.get_num_blocks_to_allocate(name, num_tokens, [], 0, 0, num_tokens)
        got = self.manager.allocate_new_blocks(name, num_tokens, num_tokens)
        assert asked == len(got), "what is asked for and what is taken must agree"
        return got

    def check(self):
        held = [b.block_id for blocks in self.manager.req_to_blocks.values() for b in blocks]
        assert len(held) == len(set(held))
        assert self.pool.get_num_free_blocks() + len(held) == self.pool.num_gpu_blocks - 1


def test_pages_follow_the_kept_tokens():
    setup = Setup()
    text = [WORD, WORD, SEPARATOR, WORD, WORD, SEPARATOR, WORD, SEPARATOR, WORD]
    setup.request("r", text)
    # Two sinks, then separators at 2, 5, 7: the fifth entry opens the second page.
    pages = [setup.manager.num_pages("r", n) for n in range(10)]
    assert pages == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    for n in range(1, 10):
        setup.allocate("r", n)
        assert len(setup.manager.req_to_blocks["r"]) == pages[n]
        setup.check()


def test_words_take_nothing_and_separators_everything():
    setup = Setup(sinks=0)
    setup.request("words", [WORD] * 100)
    setup.request("separators", [SEPARATOR] * 100)
    assert setup.allocate("words", 100) == []
    assert len(setup.allocate("separators", 100)) == 25
    setup.check()


def test_unknown_tokens_count_as_kept_until_they_are_known():
    setup = Setup(sinks=0)
    request = setup.request("r", [WORD] * 3)
    assert setup.manager.num_kept("r", 8) == 5
    setup.allocate("r", 8)  # two pages for five tokens that may all be separators
    assert len(setup.manager.req_to_blocks["r"]) == 2
    request.num_computed_tokens = 3
    request.all_token_ids += [WORD, SEPARATOR, WORD, WORD, WORD]
    assert setup.manager.num_kept("r", 8) == 1
    assert setup.allocate("r", 8) == []
    setup.check()


def test_replaced_tokens_are_counted_again():
    """Drafts that were rejected, or anything else past the computed tokens."""
    setup = Setup(sinks=0)
    request = setup.request("r", [WORD, SEPARATOR, SEPARATOR, SEPARATOR], computed=2)
    assert setup.manager.num_kept("r", 4) == 3
    request.all_token_ids[2:] = [WORD, WORD]
    assert setup.manager.num_kept("r", 4) == 1


def test_pages_come_back_and_counts_are_forgotten():
    setup = Setup()
    for name in ("a", "b"):
        setup.request(name, [SEPARATOR] * 30)
        setup.allocate(name, 30)
    setup.manager.free("a")
    setup.check()
    setup.manager.free("b")
    setup.manager.free("never allocated")
    assert setup.pool.get_num_free_blocks() == setup.pool.num_gpu_blocks - 1
    # The same id again, with another text.
    setup.request("a", [WORD] * 30)
    assert setup.manager.num_kept("a", 30) == 2


def test_random_schedules_never_lack_a_page():
    """Growth, chunks, preemption and ends in random order; pages always cover the kept tokens."""
    rng = np.random.default_rng(3)
    setup = Setup(num_blocks=400)
    for step in range(600):
        name = f"r{rng.integers(0, 6)}"
        request = setup.requests.get(name)
        if request is None:
            setup.request(name, rng.integers(0, 4, rng.integers(1, 60)))
        elif rng.random() < 0.08:
            setup.manager.free(name)
            if rng.random() < 0.5:
                request.num_computed_tokens = 0  # preempted
            else:
                del setup.requests[name]
        else:
            known = len(request.all_token_ids)
            new = int(rng.integers(1, known - request.num_computed_tokens + 1))
            target = request.num_computed_tokens + new
            setup.allocate(name, target)
            ids = np.asarray(request.all_token_ids[:target])
            kept = int(((ids == SEPARATOR) | (np.arange(target) < 2)).sum())
            assert 4 * len(setup.manager.req_to_blocks[name]) >= kept, f"step {step}"
            request.num_computed_tokens = target
            if target == known:
                request.all_token_ids.append(int(rng.integers(0, 4)))
        setup.check()
