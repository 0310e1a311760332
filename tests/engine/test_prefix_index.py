"""Prefix caching of the kept stream: pages that are found hold the prefix's kept tokens."""

import gc
import hashlib
import weakref

import numpy as np
import pytest
from helpers import make_kept_manager
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_sepllm.engine.scheduling.kept_manager import KeptManager
from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.prefix_index import COUNTS_PER_PAGE, LONG_TEXTS
from vllm_sepllm.policy import KeepRule, table_of

pytestmark = pytest.mark.engine

SIZE = 4
GROUP = 1
SEPARATOR = 1


class Request:
    def __init__(self, name, token_ids):
        self.request_id = name
        self.all_token_ids = list(token_ids)
        self.num_computed_tokens = 0

    @property
    def block_hashes(self):
        hashes, parent = [], b""
        for i in range(len(self.all_token_ids) // SIZE):
            block = bytes(self.all_token_ids[i * SIZE : (i + 1) * SIZE])
            parent = hashlib.sha256(parent + block).digest()
            hashes.append(BlockHash(parent))
        return hashes


class Model:
    """Scheduler, manager and a worker whose pages hold what was computed: the prefix itself."""

    def __init__(self, num_blocks, sinks=2):
        self.pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=SIZE)
        self.manager = make_kept_manager(self.pool, sinks)
        self.spec = self.manager.kv_cache_spec
        self.rule = KeepRule(sinks, 8, table_of([SEPARATOR], 16))
        self.requests = {}
        self.manager.attach(self.rule, self.requests, 64)
        self.manager.new_step_starts()
        self.pages = {}
        self.hits = 0

    def next_step(self):
        self.manager.step_is_scheduled()
        self.manager.new_step_starts()

    def kept(self, ids):
        return np.nonzero(self.rule.kept_flags(ids))[0]

    def start(self, request):
        """Admit a request; the tokens of the prefix found, or ``None`` without room."""
        self.requests[request.request_id] = request
        (found,), length = KeptManager.find_longest_cache_hit(
            request.block_hashes,
            len(request.all_token_ids) - 1,
            [GROUP],
            self.pool,
            self.spec,
            False,
            SIZE,
        )
        kept = self.kept(request.all_token_ids[:length])
        assert len(found) == -(-len(kept) // SIZE)
        for entry, position in enumerate(kept):
            content = self.pages[found[entry // SIZE].block_id][entry % SIZE]
            assert content == tuple(request.all_token_ids[: position + 1]), "a wrong hit"
        stop = self.chunk_end(request, length)
        asked = self.ask(request, stop, found, length)
        if asked > self.pool.get_num_free_blocks():
            del self.requests[request.request_id]
            return None
        before = self.pool.get_num_free_blocks()
        self.manager.add_local_computed_blocks(request.request_id, found, length, 0)
        self.hits += length > 0
        self.allocate(request, stop, asked, before)
        self.compute(request, length, stop)
        return length

    def chunk_end(self, request, start):
        return min(len(request.all_token_ids), start + 3 * SIZE + 1)

    def ask(self, request, stop, found=(), length=0):
        return self.manager.get_num_blocks_to_allocate(
            request.request_id, stop, found, length, length, stop
        )

    def allocate(self, request, stop, asked, before):
        self.manager.allocate_new_blocks(request.request_id, stop, stop)
        assert before - self.pool.get_num_free_blocks() == asked, "asked for and taken differ"

    def step(self, request):
        """One more chunk, or one more token; false without room."""
        start = request.num_computed_tokens
        stop = self.chunk_end(request, start)
        asked = self.ask(request, stop)
        before = self.pool.get_num_free_blocks()
        if asked > before:
            return False
        self.allocate(request, stop, asked, before)
        self.compute(request, start, stop)
        return True

    def compute(self, request, start, stop):
        self.manager.cache_blocks(request, stop)
        retained = self.manager.take_pending_cow_copies()
        for source, copy in retained:  # the worker copies before it computes
            self.pages[copy.block_id] = dict(self.pages[source.block_id])
        for pair in retained:
            self.pool.free_blocks(pair)
        blocks = self.manager.req_to_blocks[request.request_id]
        for entry, position in enumerate(self.kept(request.all_token_ids[:stop])):
            page = self.pages.setdefault(blocks[entry // SIZE].block_id, {})
            identity = tuple(request.all_token_ids[: position + 1])
            if position >= start:
                page[entry % SIZE] = identity
            assert page[entry % SIZE] == identity, "another request's tokens"
        request.num_computed_tokens = stop

    def check(self):
        held = {}
        for blocks in self.manager.req_to_blocks.values():
            for block in blocks:
                held[block.block_id] = held.get(block.block_id, 0) + 1
        assert all(self.pool.blocks[i].ref_cnt == n for i, n in held.items())
        assert self.pool.get_num_free_blocks() + len(held) == self.pool.num_gpu_blocks - 1


@pytest.mark.parametrize("num_blocks", [12, 40, 400])
@pytest.mark.parametrize("seed", range(4))
def test_random_requests_with_shared_prefixes(num_blocks, seed):
    rng = np.random.default_rng(seed)
    model = Model(num_blocks, sinks=int(rng.integers(0, 4)))
    # A tree of texts: prompts share prefixes that end anywhere.
    stems = [rng.integers(1, 4, 60).tolist() for _ in range(2)]
    name = 0
    for _ in range(500):
        action = rng.random()
        live = list(model.requests.values())
        if action < 0.35 or not live:
            stem = stems[rng.integers(2)]
            cut = int(rng.integers(1, 60))
            prompt = stem[:cut] + rng.integers(1, 4, rng.integers(0, 20)).tolist()
            name += 1
            model.start(Request(f"r{name}", prompt))
        elif action < 0.85:
            request = live[rng.integers(len(live))]
            if request.num_computed_tokens == len(request.all_token_ids):
                request.all_token_ids.append(int(rng.integers(1, 4)))
            model.step(request)
        else:
            request = live[rng.integers(len(live))]
            model.manager.free(request.request_id)
            del model.requests[request.request_id]
        if rng.random() < 0.9:  # several requests may share a step
            model.next_step()
        model.check()
    assert model.hits > 20


def test_pages_of_a_step_that_never_ran_are_not_found():
    """Scheduled and preempted in one step: nothing was computed, nothing may be found."""
    model = Model(40)
    first = Request("a", [SEPARATOR] * 30)
    model.requests["a"] = first
    model.manager.allocate_new_blocks("a", 30, 30)
    model.manager.cache_blocks(first, 30)
    model.manager.free("a")
    model.next_step()
    assert model.start(Request("b", [SEPARATOR] * 30)) == 0


def test_pages_of_the_running_step_are_not_found_yet():
    model = Model(40)
    model.start(Request("a", [SEPARATOR] * 9))
    assert model.start(Request("b", [SEPARATOR] * 9)) == 0
    model.next_step()
    assert model.start(Request("c", [SEPARATOR] * 9)) == 8


def test_texts_without_kept_tokens_are_found_without_pages():
    model = Model(40, sinks=0)
    model.start(Request("a", [2] * 13))
    model.next_step()
    assert model.start(Request("b", [2] * 13)) == 12
    assert model.manager.req_to_blocks["b"] == []


def test_alignment():
    model = Model(40)
    request = Request("a", [2, 2, SEPARATOR, 2] * 3 + [2])
    model.start(request)
    model.next_step()
    index = PoolState.of(model.pool).prefixes
    for alignment, length in ((SIZE, 12), (2 * SIZE, 8), (8 * SIZE, 0)):
        assert (
            index.find(request.block_hashes, model.pool, [GROUP], model.spec, alignment)[1]
            == length
        )


def test_an_evicted_page_ends_the_prefix():
    model = Model(40)
    request = Request("a", [SEPARATOR] * 13)
    model.start(request)
    model.next_step()
    second = model.manager.req_to_blocks["a"][1]
    model.pool._maybe_evict_cached_block(second)
    found = PoolState.of(model.pool).prefixes.find(
        request.block_hashes, model.pool, [GROUP], model.spec, SIZE
    )
    assert found[1] == 4


def test_the_index_is_bounded_and_belongs_to_its_pool():
    pools = [BlockPool(3, enable_caching=True, hash_block_size=SIZE) for _ in range(2)]
    index = PoolState.of(pools[0]).prefixes
    assert PoolState.of(pools[0]).prefixes is index
    assert PoolState.of(pools[1]).prefixes is not index
    hashes = [BlockHash(bytes([i, j])) for i in range(4) for j in range(COUNTS_PER_PAGE)]
    for i, block_hash in enumerate(hashes):
        index.store(block_hash, i, hashes[i - 1] if i else None)
        index.kept_counts(hashes[:1])  # in use, so it stays
    assert len(index) == 3 * COUNTS_PER_PAGE
    assert index.kept_counts(hashes) == [0]
    assert index.kept_counts(hashes[1:]) == []
    assert index.kept_counts(hashes[-1:]) == [len(hashes) - 1]
    known = [block_hash for block_hash in hashes[:-1] if index.kept_counts([block_hash])]
    assert [index.is_continued(block_hash) for block_hash in known] == [True] * len(known)
    assert not index.is_continued(hashes[-1]), "no text goes on behind it"
    assert not index.is_continued(hashes[1]), "what is forgotten takes no room"
    index.store(BlockHash(b"new"), 0, hashes[1])
    assert not index.is_continued(hashes[1])


def test_a_text_is_forgotten_from_its_end():
    """What is left of it is found."""
    index = PoolState.of(BlockPool(3, enable_caching=True, hash_block_size=SIZE)).prefixes
    first, second = ([BlockHash(bytes([i, j])) for j in range(64)] for i in range(2))
    for block_hash in first:
        index.store(block_hash, 7)
    assert len(index.kept_counts(first)) == 64
    for block_hash in second:  # there is room for 96
        index.store(block_hash, 7)
    assert len(index.kept_counts(first)) == 32


def test_a_pool_ends_with_its_state():
    """A process may make one engine after another."""
    pool = BlockPool(3, enable_caching=True, hash_block_size=SIZE)
    PoolState.of(pool)
    left = weakref.ref(pool)
    del pool
    gc.collect()
    assert left() is None


def test_a_page_has_no_more_keys_than_entries():
    """However long a text is that keeps nothing."""
    model = Model(40)
    text = [SEPARATOR, 2, SEPARATOR] + [2] * 400
    request = Request("a", text)
    model.start(request)
    while request.num_computed_tokens < len(text):
        model.next_step()
        assert model.step(request)
    model.next_step()
    [page] = model.manager.req_to_blocks["a"]
    keys = model.pool.cached_block_hashes_by_block.get(page.block_id, {page.block_hash})
    assert 1 <= len(keys) <= SIZE
    for stop in (8, 40, 400):  # and it is found wherever it is cut
        other = Request(f"b{stop}", [*text[:stop], 3, 3])
        assert model.start(other) == stop
        model.next_step()


def test_a_copy_of_a_page_is_found_when_the_original_is_gone():
    """It holds the entries of a text that goes on without a kept token."""
    model = Model(40)
    text = [SEPARATOR] + [2] * 40
    model.start(Request("a", text[:9]))
    model.next_step()
    [original] = model.manager.req_to_blocks["a"]
    model.manager.free("a")
    del model.requests["a"]
    assert model.start(Request("b", text)) == 8
    model.next_step()
    [copy] = model.manager.req_to_blocks["b"]
    assert copy is not original
    model.pool._maybe_evict_cached_block(original)
    assert model.start(Request("c", text[:17])) == 16


@pytest.mark.parametrize(("max_model_len", "texts"), [(17, 3), (COUNTS_PER_PAGE * 16 - 3, 4)])
def test_the_index_has_room_for_texts_longer_than_the_pool(max_model_len, texts):
    index = PoolState.of(BlockPool(3, enable_caching=True, hash_block_size=SIZE)).prefixes
    index.make_room(max_model_len, 16)
    for i in range(2 * LONG_TEXTS):
        for j in range(COUNTS_PER_PAGE):
            index.store(BlockHash(bytes([i, j])), 0)
    assert len(index) == texts * COUNTS_PER_PAGE
