"""Which pages the prefix cache keeps for the requests to come."""

import pytest
from document_trace import BLOCK_SIZE, BOOK, encode
from simulation import Simulation
from vllm.v1.core.kv_cache_utils import get_group_id

from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.spec import KeptSpec

pytestmark = pytest.mark.engine

WINDOW = 64
TAIL = 2 + 4  # blocks of a window, and of the tokens of a question
DOCUMENT = 50 * BLOCK_SIZE
BOOK_FREE = [2000 + i for i in range(400)]  # answers
QUESTIONS = [[100 * i + j for j in range(20)] for i in range(1, 8)]


@pytest.fixture(scope="module")
def book():
    return encode(BOOK.read_text(encoding="utf8")[:40000])


class Cache:
    """A simulation, one request after the other."""

    def __init__(self, num_blocks=1000, **options):
        self.simulation = Simulation(
            {"window_size": WINDOW, **options.pop("sepllm", {})},
            self._next_token,
            num_blocks=num_blocks,
            max_model_len=4096,
            hf_overrides={"max_position_embeddings": 4096},
            block_size=BLOCK_SIZE,
            **{"max_num_batched_tokens": 512, **options},
        )
        self.pool = PoolState.of(self.simulation.pool)
        self.texts = {}

    def _next_token(self, name, position, identity):
        start, answer = self._answer
        return answer[position - start]

    def ask(self, prompt, answer=BOOK_FREE[:40]):
        """Tokens found in the cache; also notes the request's tail and its text in the end."""
        name, self._answer = f"request {len(self.texts)}", (len(prompt), answer)
        self.simulation.add(name, prompt, len(answer))
        self.simulation.step()
        self.tail = self.pool.tails[name]
        while self.simulation.scheduler.has_unfinished_requests():
            self.simulation.step()
        self.simulation.check()
        assert not self.pool.tails
        self.texts[name] = prompt + answer
        return self.simulation.cached[name]

    def fill(self):
        """Others take all pages but those of the cache's better part."""
        free = self.simulation.pool.free_block_queue.get_all_free_blocks()
        spare = [page.block_id for page in free if page.block_id in self.pool.spare._pages]
        keys = {page.block_id: page.block_hash for page in free}
        while any(self.simulation.pool.blocks[i].block_hash is keys[i] for i in spare):
            first = 3 + len(self.texts)
            self.ask([first + 7 * i % 1999 for i in range(900)], [5, 5])

    @property
    def last_text(self):
        return list(self.texts.values())[-1]

    def confirmed(self, text):
        """Ends of the junctions of a text that requests came back to."""
        hashes = self.simulation._request("hashed", text, 1).block_hashes
        junctions = self.pool.junctions
        return [end for end in junctions.among(hashes) if junctions.is_confirmed(hashes[end - 1])]


def test_who_has_a_tail(book):
    """A long new text, also behind a known beginning; not what only goes on from a known text."""
    cache = Cache()
    document, other = book[:DOCUMENT], book[DOCUMENT : 2 * DOCUMENT]
    cache.ask(document + QUESTIONS[0])
    assert cache.tail == range(50 - TAIL, 50)
    cache.ask(cache.last_text + other + QUESTIONS[1])
    assert not cache.tail, "a conversation goes on"
    cache.ask(document + QUESTIONS[2])
    assert not cache.tail, "all but the question is known"
    cache.ask(document[:320] + other + QUESTIONS[3])
    assert cache.tail == range(60 - TAIL, 60)
    cache.ask(book[-4 * TAIL * BLOCK_SIZE :])
    assert cache.tail == range(3 * TAIL, 4 * TAIL)
    cache.ask(book[1 : 4 * TAIL * BLOCK_SIZE])
    assert not cache.tail, "a quarter of it is less"
    cache.ask(book[-5:])
    assert not cache.tail


@pytest.mark.parametrize("sepllm", [{}, {"max_separator_tokens": 64}])
@pytest.mark.parametrize("chunk", [256, 4096])
def test_questions_find_their_document_when_memory_was_short(book, sepllm, chunk):
    """All that is spare is gone in between; with a bound pages of the stream are spare too."""
    cache = Cache(num_blocks=220, sepllm=sepllm, max_num_batched_tokens=chunk)
    document = book[:DOCUMENT]
    cache.ask(document + QUESTIONS[0], BOOK_FREE)
    assert len(cache.pool.spare._pages) > 30, "most of the window's pages"
    for question in QUESTIONS[1:4]:
        cache.fill()
        assert cache.ask(document + question, BOOK_FREE) == DOCUMENT


def test_a_long_question_is_found_from_the_third_on(book):
    """Its document's end is further away than a tail reaches."""
    cache, document, found = Cache(num_blocks=220), book[:DOCUMENT], []
    for number in range(4):
        found.append(cache.ask(document + book[-300 * (number + 1) :][:300], BOOK_FREE))
        cache.fill()
    assert found == [0, 0, DOCUMENT, DOCUMENT]


def test_with_a_bound_what_nobody_resumes_at_is_spare(book):
    """Also where the prompt is one chunk and its pages leave at once."""
    cache = Cache(sepllm={"max_separator_tokens": 64}, max_num_batched_tokens=4096)
    cache.ask(book[: 2 * DOCUMENT], BOOK_FREE)
    kept = cache.simulation.groups[KeptSpec]
    spare = [named.block_hash for named in cache.pool.spare._pages.values()]
    assert sum(get_group_id(key) in kept for key in spare) > 4


def test_pages_that_are_found_are_spare_no_more(book):
    cache = Cache()
    document = book[:DOCUMENT]
    cache.ask(document + book[-300:])
    spare = set(cache.pool.spare._pages)
    assert cache.ask(document + QUESTIONS[0]) == DOCUMENT
    assert len(spare - set(cache.pool.spare._pages)) == 2, "a window of the document's end"


def test_what_parts_once_is_not_refreshed(book):
    """A chat without the reasoning of earlier turns parts once from each of them."""
    cache, history = Cache(), book[:DOCUMENT]
    for turn in range(4):
        reasoning, said = book[-200 * (turn + 1) :][:150], book[-90 * (turn + 1) :][:80]
        cache.ask(history + QUESTIONS[turn], reasoning + said)
        history = history + QUESTIONS[turn] + said
    hashes = cache.simulation._request("hashed", history, 1).block_hashes
    assert len(cache.pool.junctions.among(hashes)) == 3, "the later turns part"
    assert not cache.confirmed(history)


def test_a_shared_beginning_is_confirmed_by_the_third(book):
    cache = Cache()
    for number, question in enumerate(QUESTIONS[:4]):
        cache.ask(book[:640] + question)
        assert cache.confirmed(book[:700]) == ([20] if number > 1 else [])


def test_junctions_in_a_row_are_refreshed_once(book, monkeypatch):
    """Beam search confirms the end of every block. A request that passes them all looks at each of
    their pages once, however much their windows have in common."""
    cache, text = Cache(num_blocks=4000), book[:DOCUMENT]
    cache.ask(text)
    ends = range(BLOCK_SIZE, DOCUMENT - BLOCK_SIZE, BLOCK_SIZE)
    for end in [*ends, *ends]:
        cache.ask(text[:end] + [3 + len(cache.texts)] * BLOCK_SIZE, [5, 5])
    assert len(cache.confirmed(text)) >= len(ends) - 1
    looked, refresh = [], cache.pool.spare.refresh

    def counted(hashes, group):
        looked.extend((group, block_hash) for block_hash in hashes)
        refresh(hashes, group)

    monkeypatch.setattr(cache.pool.spare, "refresh", counted)
    assert cache.ask(text + QUESTIONS[0]) >= DOCUMENT - BLOCK_SIZE
    assert len(looked) == len(set(looked)) > len(ends) // 2
