"""``max_separator_tokens``: of the separators behind the window only the newest are attended to,
and a request holds no more pages than that takes, however long it is."""

import math

import pytest
from helpers import NGRAM, POOL_FILLING_TOKENS, SMALL_POOL

from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e

SINKS, WINDOW = 4, 64
# window, sinks, bound, block size, prompt chunk
CASES = [
    (64, 4, 20, 32, 256),
    (64, 0, 1, 16, 64),
    (1, 33, 37, 16, 96),
    (100, 4, 64, 32, 2048),
]


@pytest.fixture
def check(reference_model, separator_ids):
    def check(prompt, tokens, bound, window=WINDOW, sinks=SINKS):
        arguments = reference_model, prompt, tokens, separator_ids, sinks, window
        difference = first_difference(*arguments, max_separators=bound)
        assert difference is None, f"prompt of {len(prompt)} tokens, {difference}"

    return check


@pytest.mark.parametrize(("window", "sinks", "bound", "block_size", "chunk"), CASES)
def test_greedy_tokens_equal_the_reference(
    engines, book, separator_ids, check, window, sinks, bound, block_size, chunk
):
    sepllm = {"window_size": window, "num_sink_tokens": sinks, "max_separator_tokens": bound}
    engine = engines(sepllm=sepllm, block_size=block_size, max_num_batched_tokens=chunk)
    engine.check_size()
    texts = [book[:800], book[100:102], book[3000:3342], list(separator_ids[:2]) * 150]
    for prompt, tokens in zip(texts, engine.tokens(texts, max_tokens=30), strict=True):
        check(prompt, tokens, bound, window, sinks)
    engine.check_empty()


def test_the_comparison_can_fail(engines, book, check):
    engine = engines(sepllm={"window_size": WINDOW, "max_separator_tokens": 20})
    tokens = engine.tokens([book[:1500]], max_tokens=40)[0]
    check(book[:1500], tokens, 20)
    for bound in (None, 10):
        with pytest.raises(AssertionError, match="step"):
            check(book[:1500], tokens, bound)


def test_pages_held_do_not_grow(engines, book, separator_ids):
    """While a prompt is computed and while it is continued; not even if all are separators."""
    bound, block_size, chunk = 40, 16, 256
    sepllm = {"window_size": WINDOW, "num_sink_tokens": SINKS, "max_separator_tokens": bound}
    engine = engines(sepllm=sepllm, block_size=block_size, max_num_batched_tokens=chunk)
    for prompt in (book[:1800], list(separator_ids[:2]) * 900):
        engine.add("long", prompt, max_tokens=100)
        held = {"prompt": [], "answer": []}
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            engine.check_integrity()
            for request in engine.scheduler.requests.values():
                phase = "answer" if request.num_output_tokens > 1 else "prompt"
                held[phase].append(engine.held(request.request_id))
        for phase, ahead in (("prompt", chunk), ("answer", 1)):
            recent = WINDOW - 1 + ahead
            most = math.ceil(SINKS / block_size) + math.ceil((bound + recent) / block_size) + 1
            most += math.ceil(recent / block_size) + 1  # the window group's own
            assert max(held[phase]) <= most
        engine.check_empty()


def test_requests_longer_than_memory(engines, book, separator_ids, check):
    """Full attention would need 118 pages, all separators 60; 22 there are."""
    sepllm = {"window_size": WINDOW, "max_separator_tokens": 32}
    engine = engines(
        sepllm=sepllm, block_size=16, max_num_batched_tokens=64, num_gpu_blocks_override=22
    )
    prompts = [book[:1800], list(separator_ids[:2]) * 450]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=60), strict=True):
        assert len(tokens) == 60
        check(prompt, tokens, 32)


def test_a_conversation_finds_its_pages(engines, book, check):
    """Each turn computes its own tokens only, though most pages of the stream are gone."""
    sepllm = {"window_size": WINDOW, "max_separator_tokens": 16}
    engine = engines(
        sepllm=sepllm,
        block_size=16,
        max_num_batched_tokens=128,
        enable_prefix_caching=True,
        num_gpu_blocks_override=40,
    )
    assert engine.llm.reset_prefix_cache()
    text = book[:150]
    for turn in range(8):
        output = engine.generate([text], max_tokens=40)[0]
        answer = list(output.outputs[0].token_ids)
        check(text, answer, 16)
        if turn:
            assert output.num_cached_tokens >= len(text) - 150 - 16
        text = text + answer + book[1000 + 150 * turn : 1150 + 150 * turn]
    engine.check_empty()


def test_preemption_and_prefixes(engines, book, separator_ids, check):
    sepllm = {**SMALL_POOL["sepllm"], "max_separator_tokens": 12}
    # A prompt of separators takes 40 pages at most, in chunks of 512; then none fits beside it.
    engine = engines(**{**SMALL_POOL, "sepllm": sepllm, "num_gpu_blocks_override": 42})
    assert engine.llm.reset_prefix_cache()
    intruder = [separator_ids[0]] * POOL_FILLING_TOKENS
    for _ in range(2):  # cold, then from the prefix cache
        requests = {
            "long": {"prompt": book[:900], "max_tokens": 40},
            "branch": {"prompt": book[:500] + book[1500:1600], "max_tokens": 40},
        }
        outputs = engine.serve(requests, intruder)
        for name, output in outputs.items():
            check(requests[name]["prompt"], list(output.outputs[0].token_ids), 12)
    engine.check_empty()


def test_drafts(engines, book, check):
    sepllm = {"window_size": WINDOW, "max_separator_tokens": 20}
    engine = engines(sepllm=sepllm, speculative_config=NGRAM)
    counts = engine.count_drafts()
    prompts = [book[:900], book[:60] + book[:400], book[300:330]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=60), strict=True):
        check(prompt, tokens, 20)
    assert counts["drafted"] > counts["accepted"] > 0
    engine.check_empty()
