"""``position_mode="cache"``: a query numbers what it sees from 0, as the reference does, which
rebuilds the cache of every query."""

import resource

import pytest
from helpers import (
    NGRAM,
    POOL_FILLING_TOKENS,
    SMALL_POOL,
    CacheReference,
    Reference,
    save_random_model,
)

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.scheduling.prefix_index import COUNTS_PER_PAGE

pytestmark = pytest.mark.e2e

SINKS, WINDOW = 4, 64
# window, sinks, bound, block size, prompt chunk
CASES = [
    (64, 4, None, 32, 256),
    (37, 0, None, 16, 96),
    (1, 33, 37, 16, 64),
    (100, 4, 64, 16, 2048),
    (16, 4, 150, 32, 512),
    (256, 4, 20, 32, 300),
    # Beyond any context.
    (100_000, 4, None, 32, 256),
    (16, 100_000, 100_000, 32, 512),
]


@pytest.fixture
def reference_of(reference_model, separator_ids):
    def make(window=WINDOW, sinks=SINKS, bound=None):
        return CacheReference(reference_model, separator_ids, sinks, window, bound)

    return make


def cache_positions(**options):
    return {
        "window_size": WINDOW,
        "num_sink_tokens": SINKS,
        "position_mode": "cache",
        **options,
    }


@pytest.mark.parametrize(("window", "sinks", "bound", "block_size", "chunk"), CASES)
def test_greedy_tokens_equal_the_reference(
    engines, book, separator_ids, reference_of, window, sinks, bound, block_size, chunk
):
    sepllm = cache_positions(window_size=window, num_sink_tokens=sinks, max_separator_tokens=bound)
    engine = engines(sepllm=sepllm, block_size=block_size, max_num_batched_tokens=chunk)
    texts = [book[:450], book[100:102], book[3000:3200], list(separator_ids[:2]) * 100]
    for prompt, tokens in zip(texts, engine.tokens(texts, max_tokens=24), strict=True):
        reference_of(window, sinks, bound).check(prompt, tokens)
    engine.check_empty()


@pytest.mark.parametrize("bound", [None, 20])
def test_log_probabilities_equal_the_reference(engines, book, reference_of, bound):
    engine = engines(sepllm=cache_positions(max_separator_tokens=bound))
    reference = reference_of(bound=bound)
    prompt = book[2000:2350]
    output = engine.generate([prompt], max_tokens=20, logprobs=5, prompt_logprobs=0)[0]
    answer = output.outputs[0]
    tokens = prompt + list(answer.token_ids)
    entries = dict(enumerate(answer.logprobs, len(prompt)))
    reference.check_log_probs(tokens, entries, top=5)
    reference.check_log_probs(tokens, dict(enumerate(output.prompt_logprobs[1:], 1)))


def test_the_comparison_can_fail(engines, book, reference, reference_of):
    engine = engines(sepllm=cache_positions(max_separator_tokens=20))
    prompt = book[:1500]
    tokens = engine.tokens([prompt], max_tokens=40)[0]
    reference_of(bound=20).check(prompt, tokens)
    for other in (
        reference_of(),
        reference_of(bound=10),
        reference,
    ):  # the last: positions of the text
        with pytest.raises(AssertionError, match="step"):
            other.check(prompt, tokens)


@pytest.mark.parametrize("bound", [None, 12])
@pytest.mark.parametrize("memory", ["ample", "short"])
def test_preemption_and_prefixes(engines, book, separator_ids, reference_of, bound, memory):
    sepllm = cache_positions(**SMALL_POOL["sepllm"], max_separator_tokens=bound)
    # With a bound a prompt of separators takes 40 pages at most; then none fits beside it.
    blocks = 84 if memory == "ample" or bound is None else 42
    engine = engines(**{**SMALL_POOL, "sepllm": sepllm, "num_gpu_blocks_override": blocks})
    assert engine.llm.reset_prefix_cache()
    intruder = None if memory == "ample" else [separator_ids[0]] * POOL_FILLING_TOKENS
    cached = []
    for _ in range(2):  # cold, then from the prefix cache
        requests = {
            "long": {"prompt": book[:900], "max_tokens": 30},
            "branch": {"prompt": book[:500] + book[1500:1600], "max_tokens": 30},
        }
        for name, output in engine.serve(requests, intruder).items():
            reference_of(bound=bound).check(
                requests[name]["prompt"], list(output.outputs[0].token_ids)
            )
            cached.append(output.num_cached_tokens)
    if memory == "ample":
        assert cached[0] == 0
        assert min(cached[2:]) >= 576


@pytest.mark.parametrize("bound", [None, 20])
def test_drafts(engines, book, reference_of, bound):
    sepllm = cache_positions(max_separator_tokens=bound)
    engine = engines(sepllm=sepllm, speculative_config=NGRAM)
    counts = engine.count_drafts()
    prompts = [book[:700], book[:60] + book[:400], book[300:330]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=40), strict=True):
        reference_of(bound=bound).check(prompt, tokens)
    assert counts["drafted"] > counts["accepted"] > 0
    engine.check_empty()


def test_requests_beside_adapters(engines, book, reference_of):
    """Layers that adapters are added to can be asked how they rotate keys as well."""
    engine = engines(sepllm=cache_positions(max_separator_tokens=20), enable_lora=True)
    tokens = engine.tokens([book[:500]], max_tokens=20)[0]
    reference_of(bound=20).check(book[:500], tokens)


def test_compiled(engines, book, first_layers, separator_ids):
    model, path = first_layers(2)
    sepllm = cache_positions(max_separator_tokens=20)
    engine = engines(sepllm=sepllm, model=path, enforce_eager=False)
    reference = CacheReference(model, separator_ids, SINKS, WINDOW, bound=20)
    prompts = [book[:700], book[3000:3342]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=30), strict=True):
        reference.check(prompt, tokens)


@pytest.mark.parametrize(("policy", "interval"), [("streaming", None), ("fixed_interval", 5)])
def test_other_policies(engines, book, reference_model, policy, interval):
    """StreamingLLM as it was published: sinks and window, in cache positions."""
    options = {"policy": policy} if interval is None else {"policy": policy, "interval": interval}
    engine = engines(sepllm=cache_positions(**options), max_num_batched_tokens=96)
    reference = CacheReference(reference_model, (), SINKS, WINDOW, interval=interval)
    prompts = [book[:700], book[100:102]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=30), strict=True):
        reference.check(prompt, tokens)


def test_beyond_the_trained_length(engines, book, reference_of):
    """The model is made for 2,048 positions and never sees one past the 88th."""
    sepllm = cache_positions(max_separator_tokens=20)
    engine = engines(sepllm=sepllm, max_model_len=8192, max_num_batched_tokens=512)
    prompts = [book[:2030], book[:7000]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=30), strict=True):
        reference_of(bound=20).check(prompt, tokens)
    engine.check_empty()


def test_a_text_longer_than_the_pool_is_found_again(engines, book, reference_of):
    """Of 13,000 tokens the pool holds 300 at a time."""
    engine = engines(
        sepllm=cache_positions(max_separator_tokens=20),
        max_model_len=16384,
        block_size=16,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=24,
        enable_prefix_caching=True,
    )
    assert engine.llm.reset_prefix_cache()
    text = book[:13000]
    assert len(text) > COUNTS_PER_PAGE * 24 * 16
    first, second = (engine.generate([text], max_tokens=8)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (len(text) - 1) // 16 * 16
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert len(set(first.outputs[0].token_ids)) > 1


def test_tables_of_long_texts_are_small(engines):
    """Four texts of four million tokens, by the address space that an engine takes more."""
    sepllm = cache_positions(max_separator_tokens=20)

    def taken(length):
        before = address_space()
        engines(sepllm=sepllm, max_model_len=length, max_num_seqs=4)
        return address_space() - before

    engines(sepllm=sepllm, max_num_seqs=3)  # what a process takes once is taken
    short = taken(2048)
    assert taken(4 << 20) - short < 1 << 30


def address_space():
    """Bytes, of memory that was never touched too."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


MODELS = {
    "plain, one KV head": ("LlamaConfig", {"num_key_value_heads": 1, **rope("default")}),
    "linear": ("LlamaConfig", rope("linear", factor=4.0)),
    "llama3": (
        "LlamaConfig",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    "yarn": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "partial": (
        "StableLmConfig",
        rope("default", partial_rotary_factor=0.25),
    ),
    "partial, interleaved": (
        "Glm4Config",
        {"head_dim": 32, **rope("default", partial_rotary_factor=0.5)},
    ),
    "interleaved": ("CohereConfig", rope("default")),
    "query and key norms": ("Qwen3Config", {"head_dim": 32, **rope("default")}),
    "sliding layers, soft cap": (
        "Gemma2Config",
        {
            "hidden_size": 64,
            "sliding_window": 48,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            **rope("default"),
        },
    ),
}


REFUSED = {
    "learned positions": ("OPTConfig", {"word_embed_proj_dim": 128, "ffn_dim": 256}, "no rotary"),
    "longrope": (
        "Phi3Config",
        rope("longrope", short_factor=[1.0] * 16, long_factor=[2.0] * 16, factor=2.0)
        | {"original_max_position_embeddings": 256},
        "does more to its keys, or another thing",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_are_refused(engines, tmp_path, kind):
    import transformers

    name, options, sentence = REFUSED[kind]
    save_random_model(getattr(transformers, name)(**{**SIZES, **options}), tmp_path)
    sepllm = cache_positions(max_separator_tokens=20)
    with pytest.raises(ConfigError, match=sentence):
        engines(sepllm=sepllm, model=str(tmp_path), max_model_len=256)


@pytest.mark.parametrize("kind", MODELS)
def test_rotary_embeddings(engines, book, separator_ids, tmp_path, kind):
    import transformers

    name, options = MODELS[kind]
    bound = 12 if list(MODELS).index(kind) % 2 else None
    model = save_random_model(getattr(transformers, name)(**{**SIZES, **options}), tmp_path)
    sepllm = cache_positions(window_size=32, max_separator_tokens=bound)
    engine = engines(sepllm=sepllm, model=str(tmp_path), max_model_len=512)
    is_neox = "interleaved" not in kind
    reference = CacheReference(model, separator_ids, SINKS, 32, bound, is_neox)
    prompts = [book[:280], book[900:930]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=30), strict=True):
        reference.check(prompt, tokens)
    if "sliding" in kind:
        return  # one mask for all layers is another model
    original = Reference(model, separator_ids, SINKS, 32)
    with pytest.raises(AssertionError, match="step"):
        original.check(prompts[0], engine.tokens(prompts[:1], max_tokens=30)[0])
