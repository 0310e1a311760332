"""Models with random weights: mixed layer kinds, logit caps, grouped and single KV heads."""

import pytest
import torch
from helpers import CacheReference, save_random_model

from vllm_sepllm.config import ConfigError
from vllm_sepllm.oracle.dense_mask import sepllm_mask

pytestmark = pytest.mark.e2e

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@torch.no_grad()
def greedy_difference(model, prompt, tokens, masks):
    """First step at which ``tokens`` leave the model's greedy choice, or ``None``."""
    assert tokens
    ids = torch.tensor([prompt + tokens])
    logits = model(input_ids=ids, attention_mask=masks).logits[0, len(prompt) - 1 : -1]
    wrong = (logits.argmax(-1) != torch.tensor(tokens)).nonzero()
    return int(wrong[0]) if len(wrong) else None


def bias(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]


@pytest.mark.parametrize("family", ["gemma3", "gemma2"])
def test_only_full_attention_layers_of_a_mixed_model(
    engines, book, separator_ids, tmp_path, family
):
    """Sliding-window layers keep their own window, here as wide as SepLLM's; gemma2 caps logits."""
    from transformers import Gemma2Config, Gemma3TextConfig

    sliding, window = 64, 64
    kinds = ["sliding_attention", "full_attention"] * 2
    extra = {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": sliding}
    extra |= {"num_hidden_layers": 4, "layer_types": kinds, "query_pre_attn_scalar": 32}
    cls = {"gemma3": Gemma3TextConfig, "gemma2": Gemma2Config}[family]
    model = save_random_model(cls(**SIZES, **extra), tmp_path)
    engine = engines(
        sepllm={"window_size": window},
        model=str(tmp_path),
        max_model_len=1024,
        disable_log_stats=False,
    )
    kept_layers = [
        type(g.kv_cache_spec).__name__ for g in engine.scheduler.kv_cache_config.kv_cache_groups
    ]
    assert sorted(kept_layers) == ["KeptSpec", "SlidingWindowSpec", "WindowSpec"]
    for prompt in (book[:600], book[900:950]):
        tokens = engine.tokens([prompt], max_tokens=30)[0]
        ids = prompt + tokens
        masks = {
            "full_attention": bias(sepllm_mask(ids, separator_ids, 4, window)),
            "sliding_attention": bias(sepllm_mask(ids, (), 0, sliding)),
        }
        assert greedy_difference(model, prompt, tokens, masks) is None
    held = [m for m in engine.llm.get_metrics() if m.name == "vllm:sepllm_pages_held"]
    assert {m.labels["group"] for m in held} == {"window", "kept", "other"}
    long = book[:600]
    tokens = engine.tokens([long], max_tokens=30)[0]
    size = len(long + tokens)
    dense = dict.fromkeys(masks, bias(sepllm_mask(long + tokens, (), 0, size)))
    assert greedy_difference(model, long, tokens, dense) is not None, "any mask would pass"


def test_a_dense_layer_with_a_sliding_window(engines, tmp_path):
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    extra = {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 64}
    save_random_model(
        Gemma3TextConfig(**SIZES, **extra, num_hidden_layers=2, layer_types=kinds), tmp_path
    )
    with pytest.raises(ConfigError, match="holds 0, a layer with a sliding window of 64 tokens"):
        engines(sepllm={"dense_layers": [0]}, model=str(tmp_path), max_model_len=1024)


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim"), [(4, 64), (1, 32), (2, 80)], ids=["MHA", "MQA", "head size 80"]
)
def test_head_counts_and_sizes(engines, book, separator_ids, tmp_path, num_kv_heads, head_dim):
    from transformers import LlamaConfig

    extra = {"num_key_value_heads": num_kv_heads, "head_dim": head_dim, "num_hidden_layers": 2}
    model = save_random_model(LlamaConfig(**SIZES, **extra), tmp_path)
    engine = engines(sepllm={"window_size": 48}, model=str(tmp_path), max_model_len=1024)
    prompts = [book[:500], book[900:930]]
    for prompt, tokens in zip(prompts, engine.tokens(prompts, max_tokens=30), strict=True):
        mask = bias(sepllm_mask(prompt + tokens, separator_ids, 4, 48))
        assert greedy_difference(model, prompt, tokens, mask) is None


@torch.no_grad()
def greedy(model, prompt, separator_ids, sinks, window):
    """12 tokens of the model's own choice under the mask."""
    ids = list(prompt)
    for _ in range(12):
        mask = bias(sepllm_mask(ids, separator_ids, sinks, window))
        ids.append(int(model(torch.tensor([ids]), attention_mask=mask).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_pythia(engines, book, separator_ids, tmp_path):
    """The architecture of Pythia, through vLLM's Transformers backend: a quarter is rotated, here
    with YaRN, in positions of the text and in cache positions.

    The references go first: that backend changes the classes of transformers themselves.
    """
    from transformers import GPTNeoXConfig

    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 256, "partial_rotary_factor": 0.25}
    sizes = {**SIZES, "hidden_size": 256, "rope_parameters": rope}
    config = GPTNeoXConfig(**sizes, num_hidden_layers=2)
    config.architectures = ["GPTNeoXForCausalLM"]
    model = save_random_model(config, tmp_path)
    prompts = [book[:500], book[900:930]]
    expected = [greedy(model, prompt, separator_ids, 4, 48) for prompt in prompts]
    assert greedy(model, prompts[0], (), 0, 1024) != expected[0], "any mask would pass"
    reference = CacheReference(model, separator_ids, 4, 48, 12)
    in_cache_positions = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(reference.logits(ids)[-1].argmax()))
        in_cache_positions.append(ids[len(prompt) :])
    assert in_cache_positions[0] != expected[0], "any positions would pass"
    options = {"model": str(tmp_path), "max_model_len": 1024}
    engine = engines(sepllm={"window_size": 48}, **options)
    assert engine.tokens(prompts, max_tokens=12) == expected
    sepllm = {"window_size": 48, "max_separator_tokens": 12, "position_mode": "cache"}
    engine = engines(sepllm=sepllm, **options)
    assert engine.tokens(prompts, max_tokens=12) == in_cache_positions
