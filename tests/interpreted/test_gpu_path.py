"""The GPU backend in an engine on a CPU, run by ``e2e/test_gpu_path.py`` for each model runner.

Short prompts: Triton's interpreter takes about 10 ms per prompt token of the demo model.
"""

import os

import pytest
from helpers import NGRAM, CacheReference
from xformers_masks import attend_under_bias

from vllm_sepllm.engine.gpu_backend import SepLLMGPUImpl
from vllm_sepllm.reference import first_difference, masked_logits, sepllm_mask

pytestmark = pytest.mark.e2e

WINDOW, SINKS = 20, 3
# One prompt of 511 separators fits and nothing beside it; with two steps in flight it needs more.
NUM_BLOCKS = 44 if os.environ.get("SEPLLM_TEST_ASYNC_SCHEDULING") == "1" else 40
OPTIONS = {
    "sepllm": {"window_size": WINDOW, "num_sink_tokens": SINKS},
    "block_size": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": NUM_BLOCKS,
    "scheduler_reserve_full_isl": False,
    "scheduling_policy": "priority",
}


@pytest.fixture
def engine(engines):
    assert os.environ["SEPLLM_TEST_GPU_PATH"] == "1"
    engine = engines(**OPTIONS)
    worker = engine.core.model_executor.driver_worker.worker
    assert all(isinstance(x.impl, SepLLMGPUImpl) for x in worker.sepllm_layers().values())
    assert len(worker.sepllm_layers()) == worker.model_config.get_total_num_hidden_layers()
    assert engine.llm.reset_prefix_cache()
    yield engine
    engine.check_empty()


@pytest.fixture
def check_bounded(reference_model, separator_ids):
    def check(prompt, tokens, bound):
        arguments = reference_model, prompt, tokens, separator_ids, SINKS, WINDOW
        difference = first_difference(*arguments, max_separators=bound)
        assert difference is None, f"prompt of {len(prompt)} tokens, {difference}"

    return check


@pytest.fixture
def check(check_bounded):
    return lambda prompt, tokens: check_bounded(prompt, tokens, None)


def test_chunks_and_mixed_batches(engine, book, separator_ids, check):
    """Prompts of several chunks and of less than one, computed while others decode."""
    prompts = [book[:150], book[100:102], book[300:340], list(separator_ids[:2]) * 40]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=20), strict=True):
        assert len(tokens) == 20
        check(prompt, tokens)


def test_prefix_hits(engine, book, check):
    """A conversation that goes on, and another that parts inside a page."""
    first = book[:120]
    answer = engine.tokens([first], max_tokens=8)[0]
    for prompt in (first + answer + book[500:530], first[:77] + book[600:640]):
        output = engine.generate([prompt], max_tokens=8)[0]
        assert output.num_cached_tokens >= 64
        check(prompt, list(output.outputs[0].token_ids))


def test_preemption(engine, book, separator_ids, check):
    requests = {
        "prose": {"prompt": book[:130], "max_tokens": 20},
        "short": {"prompt": book[200:220], "max_tokens": 20},
    }
    outputs = engine.serve(requests, [separator_ids[0]] * 511)
    for name, output in outputs.items():
        check(requests[name]["prompt"], list(output.outputs[0].token_ids))


def test_drafts(engines, book, check):
    """Some are accepted, some rejected."""
    engine = engines(**OPTIONS, speculative_config=NGRAM)
    prompts = [book[:60] + book[:40], book[300:330]]
    counts = engine.count_drafts()
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=30), strict=True):
        check(prompt, tokens)
    assert counts["drafted"] > counts["accepted"] > 0, "nothing was drafted, accepted or rejected"
    engine.check_empty()


def test_bounded_separators(engines, book, check_bounded):
    """Chunks and decoding, while pages of the stream leave."""
    sepllm = {**OPTIONS["sepllm"], "max_separator_tokens": 5}
    engine = engines(**{**OPTIONS, "sepllm": sepllm})
    prompts = [book[:200], book[300:340]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=16), strict=True):
        check_bounded(prompt, tokens, 5)
    engine.check_empty()


@pytest.mark.parametrize("bound", [None, 5])
def test_cache_positions(engines, book, separator_ids, reference_model, bound):
    """Chunks, decoding beside a prompt, and a prefix found in the cache."""
    sepllm = {**OPTIONS["sepllm"], "max_separator_tokens": bound, "position_mode": "cache"}
    engine = engines(**{**OPTIONS, "sepllm": sepllm})
    reference = CacheReference(reference_model, separator_ids, SINKS, WINDOW, bound)
    for prompts in ([book[:100], book[300:320]], [book[:80] + book[600:612]]):
        for prompt, output in zip(prompts, engine.generate(prompts, max_tokens=12), strict=True):
            reference.check(prompt, list(output.outputs[0].token_ids))
    assert output.num_cached_tokens >= 64
    engine.check_empty()


@pytest.mark.parametrize(("policy", "interval"), [("streaming", None), ("fixed_interval", 5)])
def test_other_policies(engines, book, reference_model, policy, interval):
    options = {"policy": policy} if interval is None else {"policy": policy, "interval": interval}
    engine = engines(**{**OPTIONS, "sepllm": {**OPTIONS["sepllm"], **options}})
    ids = book[:90] + engine.tokens([book[:90]], max_tokens=8)[0]
    logits = masked_logits(reference_model, ids, sepllm_mask(ids, (), SINKS, WINDOW, interval))
    assert logits[89:-1].argmax(-1).tolist() == ids[90:]
    engine.check_empty()


@pytest.fixture
def xformers_calls(monkeypatch):
    """Tokens of each call of xformers' attention."""
    from sepllm_kernels.kept_prefill import xformers_window

    def attend(query, *args, **kwargs):
        calls.append(query.shape[1])
        return attend_under_bias(query, *args, **kwargs)

    calls = []
    monkeypatch.setattr(xformers_window, "memory_efficient_attention_partial", attend)
    return calls


@pytest.mark.parametrize("position_mode", ["original", "cache"])
def test_prompts_with_xformers(
    engines, book, reference_model, separator_ids, check, xformers_calls, position_mode
):
    """Chunks, a short prompt, and chunks of one while another decodes."""
    sepllm = {"prefill_kernel": "xformers", "position_mode": position_mode}
    engine = engines(**{**OPTIONS, "sepllm": {**OPTIONS["sepllm"], **sepllm}})
    prompts = [book[:150], book[100:102], book[300:340]]
    if position_mode == "cache":
        prompts = [book[:90], book[100:102]]
        check = CacheReference(reference_model, separator_ids, SINKS, WINDOW).check
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=12), strict=True):
        check(prompt, tokens)
    assert xformers_calls, "xformers was not called"
    engine.check_empty()


@pytest.mark.skipif(
    os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1",
    reason="dense layers run vLLM's Triton backend, which a CPU engine loads with the V2 runner",
)
def test_dense_layers(engines, book, reference_model, separator_ids, monkeypatch):
    # Which vLLM asks for when it launches its kernel.
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    sepllm = {**OPTIONS["sepllm"], "dense_layers": [0, -1]}
    engine = engines(**{**OPTIONS, "sepllm": sepllm, "block_size": 32})
    tokens = engine.tokens([book[:90]], max_tokens=8)[0]
    arguments = reference_model, book[:90], tokens, separator_ids, SINKS, WINDOW
    assert first_difference(*arguments, dense_layers=[0, 5]) is None
    engine.check_empty()
