"""Drafts from the prompt (ngram), most of them rejected, never change a token."""

import pytest

from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.mark.parametrize(("window", "block_size", "caching"), [(16, 16, False), (3, 32, True)])
def test_ngram_drafts(engines, book, reference_model, separator_ids, window, block_size, caching):
    engine = engines(
        sepllm={"window_size": window},
        block_size=block_size,
        speculative_config=NGRAM,
        enable_prefix_caching=caching,
    )
    counts = engine.count_drafts()
    prompts = [book[:900], book[100:130], book[:400] + book[:300], list(separator_ids[:3]) * 60]
    for _ in range(2):  # cold, then warm where caching is on
        for prompt, tokens in zip(prompts, engine.tokens(prompts, 60), strict=True):
            assert len(tokens) == 60
            difference = first_difference(reference_model, prompt, tokens, separator_ids, 4, window)
            assert difference is None, f"prompt of {len(prompt)} tokens, {difference}"
        engine.check_integrity()
    assert counts["drafted"] > counts["accepted"] > 0, "nothing was drafted, accepted or rejected"
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
