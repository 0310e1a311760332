"""Prefix caching: a hit saves work and never changes a token."""

import pytest

from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.tally import KEPT, WINDOW
from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e


def family(book, block_size):
    """Prompts that share prefixes of many lengths and part in the middle of blocks and pages."""
    stem = book[:900]
    prompts = [stem, stem[:500] + book[2000:2300], stem[:501] + book[3000:3200]]
    prompts += [stem + book[4000:4100], stem[: 3 * block_size], stem[: 3 * block_size + 1]]
    prompts += [stem[: 7 * block_size] + book[5000:5400], stem]
    return prompts


def run_one_by_one(engine, prompts, max_tokens=24):
    """Tokens and cached prompt tokens of each prompt, one after the other."""
    tokens, cached = [], []
    for prompt in prompts:
        output = engine.generate([prompt], max_tokens)[0]
        tokens.append(list(output.outputs[0].token_ids))
        cached.append(output.num_cached_tokens)
        engine.check_integrity()
    return tokens, cached


@pytest.mark.parametrize(
    ("window", "sinks", "block_size", "chunk"),
    [
        (64, 4, 32, 256),
        (1, 0, 16, 64),
        (2, 0, 16, 64),
        (100, 33, 16, 96),
        (256, 4, 32, 512),
        (33, 4, 128, 2048),
    ],
)
def test_warm_equals_the_reference(
    engines, book, reference_model, separator_ids, window, sinks, block_size, chunk
):
    engine = engines(
        sepllm={"window_size": window, "num_sink_tokens": sinks},
        block_size=block_size,
        max_num_batched_tokens=chunk,
        enable_prefix_caching=True,
    )
    prompts = family(book, block_size)
    tokens, cached = run_one_by_one(engine, prompts)
    assert cached[0] == 0
    if window > 1:  # a window of the token itself leaves vLLM no window page to find
        assert cached[-1] == (len(prompts[-1]) - 1) // block_size * block_size
        assert cached[1] > 0.8 * 500 - block_size
    together = engine.tokens(prompts, 24)
    for prompt, alone, batched in zip(prompts, tokens, together, strict=True):
        assert alone == batched
        assert (
            first_difference(reference_model, prompt, alone, separator_ids, sinks, window) is None
        )
    engine.check_integrity()
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_hits_are_those_of_full_attention(engines, book):
    """With memory to spare, as many prompt tokens come from the cache."""
    prompts = family(book, 32)
    cached = {}
    for name, sepllm in (("sepllm", {"window_size": 64}), ("dense", None)):
        engine = engines(sepllm=sepllm, enable_prefix_caching=True)
        cached[name] = run_one_by_one(engine, prompts, 4)[1]
    assert cached["sepllm"] == cached["dense"]
    assert cached["dense"][1:] == [480, 480, 896, 64, 96, 224, 896]


def test_turns_of_a_chat(engines, book, reference_model, separator_ids):
    """Each turn computes only what is new, over its own earlier answers."""
    engine = engines(sepllm={"window_size": 64}, enable_prefix_caching=True)
    history = book[:200]
    for turn in range(6):
        history = history + book[3000 + 70 * turn : 3000 + 70 * (turn + 1)]
        output = engine.generate([history], 40)[0]
        tokens = list(output.outputs[0].token_ids)
        if turn:
            new = len(history) - output.num_cached_tokens
            assert new <= 70 + 32 + 1, "more than the new turn was computed"
        assert first_difference(reference_model, history, tokens, separator_ids, 4, 64) is None
        history = history + tokens


def test_eviction_under_pressure(engines, book, reference_model, separator_ids):
    """A pool that cannot keep everything: pages are evicted and reused, tokens stay right."""
    engine = engines(
        sepllm={"window_size": 64}, enable_prefix_caching=True, num_gpu_blocks_override=66
    )
    stems = [book[i * 1000 : i * 1000 + 700] for i in range(4)]
    hits = 0
    for turn in range(3):
        prompts = [stem + book[9000 + 40 * turn : 9040 + 40 * turn] for stem in stems]
        for prompt, output in zip(prompts, engine.generate(prompts, 20), strict=True):
            tokens = list(output.outputs[0].token_ids)
            hits += output.num_cached_tokens > 0
            assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None
        engine.check_integrity()
    assert 0 < hits < 8, "nothing was found, or nothing was evicted"
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_preempted_requests_find_their_own_pages(engines, book, reference_model, separator_ids):
    engine = engines(
        sepllm={"window_size": 64},
        enable_prefix_caching=True,
        num_gpu_blocks_override=24,
        max_model_len=512,
    )
    prompts = {f"r{i}": book[i * 600 : i * 600 + 60] for i in range(6)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, 300)
    found = PoolState.of(engine.pool).tally.found
    assert not found
    preempted, tokens = set(), {}
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        preempted |= {r.request_id for r in engine.scheduler.requests.values() if r.num_preemptions}
        engine.check_integrity()
    assert preempted, "nothing was preempted, nothing was tested"
    assert found[WINDOW], "they were computed from nothing"
    assert found[KEPT]
    for name, prompt in prompts.items():
        assert len(tokens[name]) == 300
        assert first_difference(reference_model, prompt, tokens[name], separator_ids, 4, 64) is None


def test_reset_forgets_everything(engines, book):
    engine = engines(sepllm={"window_size": 64}, enable_prefix_caching=True)
    engine.generate([book[:300]], 4)
    assert engine.generate([book[:300]], 4)[0].num_cached_tokens > 0
    assert engine.llm.reset_prefix_cache()
    assert engine.generate([book[:300]], 4)[0].num_cached_tokens == 0


def test_salts_keep_users_apart(engines, book):
    from vllm import SamplingParams

    engine = engines(sepllm={"window_size": 64}, enable_prefix_caching=True)
    engine.llm.reset_prefix_cache()
    params = SamplingParams(max_tokens=4, temperature=0)

    def cached(salt):
        prompt = {"prompt_token_ids": book[:400], "cache_salt": salt}
        return engine.llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens

    assert cached("a") == 0
    assert cached("a") == 384
    assert cached("b") == 0


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
def test_hash_algorithms(engines, book, algorithm):
    engine = engines(
        sepllm={"window_size": 64},
        enable_prefix_caching=True,
        prefix_caching_hash_algo=algorithm,
    )
    engine.generate([book[:300]], 4)
    assert engine.generate([book[:300]], 4)[0].num_cached_tokens == 288
