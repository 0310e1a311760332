"""The kept group's manager over vLLM's real block pool."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_kept_manager
from vllm.v1.core.block_pool import BlockPool

from vllm_sepllm.policy import KeepRule, table_of

pytestmark = pytest.mark.engine

SEPARATOR, WORD = 1, 2


class Setup:
    def __init__(self, num_blocks=50, block_size=4, sinks=2, bound=None):
        self.pool = BlockPool(num_blocks, enable_caching=False, hash_block_size=block_size)
        self.manager = make_kept_manager(self.pool, sinks, bound)
        self.requests = {}
        table = table_of([SEPARATOR], 10)
        policy = KeepRule(sinks, 8, table, max_separator_tokens=bound)
        self.manager.attach(policy, self.requests, 64)

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
        tables = self.manager.req_to_blocks.values()
        held = [b.block_id for blocks in tables for b in blocks if not b.is_null]
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


def test_pages_behind_the_bound_leave():
    """Window 8, pages of 4, 2 sinks, of the separators before the window the newest 5."""
    setup = Setup(bound=5)
    request = setup.request("r", [SEPARATOR] * 60)
    for computed in range(60):
        setup.manager.remove_skipped_blocks("r", computed)
        setup.allocate("r", computed + 1)
        request.num_computed_tokens = computed + 1
        pages = setup.manager.req_to_blocks["r"]
        assert len(pages) == -(-(computed + 1) // 4)
        limit = max(0, computed - 7)  # of the token just computed; all are kept
        seen = {0} | {e // 4 for e in range(max(2, limit - 5), computed + 1)}
        held = {index for index, page in enumerate(pages) if not page.is_null}
        assert held == seen & set(range(len(pages))), computed
        setup.check()
    setup.manager.free("r")
    assert setup.pool.get_num_free_blocks() == setup.pool.num_gpu_blocks - 1


def test_tokens_not_known_yet_make_no_page_leave():
    """In a window of one token, what a token sees depends on the ids right before it."""
    setup = Setup(bound=1, sinks=0)
    request = setup.request("r", [SEPARATOR] * 20)
    setup.allocate("r", 20)
    request.num_computed_tokens = 20
    # Of 40 tokens said to be processed 20 are known: the last may be words.
    setup.manager.remove_skipped_blocks("r", 40)
    held = [not page.is_null for page in setup.manager.req_to_blocks["r"]]
    assert held == [False] * 4 + [True]


@pytest.mark.parametrize("num_tokens", [1, 30, 500])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_what_a_bounded_request_holds_at_most(num_tokens, chunk):
    """As large as the most it holds in chunks of any cut, and no larger."""
    rng = np.random.default_rng(num_tokens)
    text = rng.choice([SEPARATOR, WORD, WORD], num_tokens).tolist()
    most = 0
    for first in range(1, chunk + 1):
        setup = Setup(num_blocks=400, bound=6)
        setup.manager._num_in_flight = chunk
        request = setup.request("r", text)
        expected = setup.manager.most_pages("r", num_tokens, chunk)
        computed = 0
        while computed < num_tokens:
            setup.manager.remove_skipped_blocks("r", computed)
            stop = min(num_tokens, computed + (chunk if computed else first))
            setup.allocate("r", stop)
            pages = setup.manager.req_to_blocks["r"]
            most = max(most, sum(not page.is_null for page in pages))
            request.num_computed_tokens = computed = stop
        assert most <= expected
    assert most == expected


def test_admission_counts_pages_that_leave_once():
    setup = Setup(num_blocks=400, bound=6)
    setup.manager._num_in_flight = 16
    setup.request("r", [SEPARATOR] * 1000)
    arguments = ("r", 1000, [], 0, 0, 1000)
    # Sinks, the bound, the window less one and the chunk: 6 + 7 + 16 entries, over edges of pages.
    assert setup.manager.get_num_blocks_to_allocate(*arguments) == 250
    capped = setup.manager.get_num_blocks_to_allocate(*arguments, apply_admission_cap=True)
    assert capped == setup.manager.most_pages("r", 1000, 16) == 9


@pytest.mark.parametrize("bound", [None, 1, 9])
def test_inspect_counts_the_pages_that_are_held(bound):
    """At every position, what ``summarize`` says and both managers of a request hold."""
    import torch
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    from vllm_sepllm.cli.inspection import summarize

    setup = Setup(num_blocks=200, bound=bound)
    spec = SlidingWindowSpec(
        block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8
    )
    window = SlidingWindowManager(
        spec,
        block_pool=setup.pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=4,
    )
    text = [SEPARATOR if i % 3 == 0 or 40 < i < 60 else WORD for i in range(120)]
    setup.request("r", text)
    rule = KeepRule(2, 8, table_of([SEPARATOR], 10), max_separator_tokens=bound)
    for position in range(len(text)):
        for manager in (window, setup.manager):
            manager.remove_skipped_blocks("r", position)
        window.allocate_new_blocks("r", position + 1, position + 1)
        setup.allocate("r", position + 1)
        summary = summarize(text[: position + 1], rule, 4)
        held = [
            sum(not block.is_null for block in manager.req_to_blocks["r"])
            for manager in (window, setup.manager)
        ]
        assert held == [summary.window_pages, summary.kept_pages]
