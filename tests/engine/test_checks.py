"""Every refusal comes before a model is loaded, and names value, limit and remedy."""

import json
from types import SimpleNamespace

import pytest
from helpers import MODEL

from vllm_sepllm.engine.cpu.platform import _cpu
from vllm_sepllm.engine.startup import checks

pytestmark = pytest.mark.engine


def refusal(**options):
    """The message of a configuration that must be refused."""
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"model": MODEL, "attention_backend": "sepllm", "max_model_len": 512}
    with pytest.raises(ValueError, match="SepLLM attention: ") as caught:
        EngineArgs(**{**defaults, **options}).create_engine_config()
    return str(caught.value)


OPTIONS = [
    ({"window": 64}, "unknown SepLLM option 'window': did you mean 'window_size'?"),
    ({"window_size": 0}, "window_size=0: must be at least 1"),
    ({"window_size": -5}, "window_size=-5: must be at least 1"),
    ({"window_size": 1.5}, "window_size=1.5: must be a whole number"),
    ({"window_size": "64"}, "window_size='64': must be a whole number"),
    ({"window_size": True}, "window_size=True: must be a whole number"),
    ({"window_size": 2**40}, "must be at most"),
    ({"num_sink_tokens": -1}, "num_sink_tokens=-1: must be at least 0"),
    ({"separators": []}, "separators=[]: must be a non-empty list"),
    ({"separators": ["☃"]}, "no separator found"),
    ({"separator_token_ids": [4096]}, "must be below the vocabulary size 4096"),
    ({"separator_token_ids": [-3]}, "holds -3"),
    ({"keep": ["separators", 4096]}, "token id 4096: must be below the vocabulary size 4096"),
    ({"keep": ["separators", "digits"], "separator_token_ids": [5000]}, "token id 5000: must be"),
    ({"keep": ["digit"]}, "classes are separators, special, digits, capitalized"),
    ({"separator_match": "loose"}, "separator_match='loose': must be one of 'exact'"),
    ({"policy": "h2o"}, "policy='h2o': must be one of"),
    ({"policy": "fixed_interval"}, "policy='fixed_interval' without interval"),
    ({"policy": "streaming", "separators": ["."]}, "separators=('.',) with policy='streaming'"),
    (
        {"policy": "streaming", "separator_token_ids": [5]},
        "separator_token_ids=[5] with policy='streaming'",
    ),
    ({"policy": "sepllm", "interval": 5}, "interval=5 with policy='sepllm'"),
    ({"max_separator_tokens": 0}, "max_separator_tokens=0: must be at least 1"),
    (
        {"position_mode": "cache", "dense_layers": [0]},
        "dense_layers=[0] with position_mode='cache'",
    ),
    ({"prefill_kernel": "xformers"}, "prefill_kernel='xformers' is not for CPU: leave it out"),
    ({"dense_layers": [6]}, "dense_layers holds 6: the model has 6 layers"),
    ({"dense_layers": list(range(6))}, "dense_layers names all 6 layers"),
    ([], "expected a mapping"),
]


@pytest.mark.parametrize(("options", "sentence"), OPTIONS)
def test_options(options, sentence):
    assert sentence in refusal(additional_config={"sepllm": options})


@pytest.mark.parametrize(
    ("options", "length", "sentence"),
    [
        ({"max_separator_tokens": 64}, 2**23 + 1, "max_model_len=8388609: must be at most 8388608"),
        (
            {"max_separator_tokens": 2000},
            5000,
            "window_size is 2260: the cache must fit into the 2048",
        ),
        ({"policy": "streaming", "window_size": 2045}, 5000, "window_size is 2049: the cache must"),
    ],
)
def test_cache_positions(options, length, sentence):
    sepllm = {"position_mode": "cache", **options}
    message = refusal(max_model_len=length, additional_config={"sepllm": sepllm})
    assert sentence in message


def make_config(**options):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(**{"model": MODEL, "attention_backend": "sepllm", **options})
    config = arguments.create_engine_config()
    assert arguments.max_model_len == options.get("max_model_len")
    return config


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ({"max_separator_tokens": 64}, 324),
        ({"max_separator_tokens": 1788}, 2048),
        ({"policy": "streaming"}, 260),
        ({}, None),
        ({"policy": "fixed_interval", "interval": 5}, None),
    ],
)
def test_texts_beyond_the_trained_length(monkeypatch, options, cache):
    from vllm_sepllm.engine.startup import prepare as startup

    said = []
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(
            startup.logger,
            level,
            lambda text, *args, level=level: said.append((level, text % args)),
        )
    sepllm = {"position_mode": "cache", **options}
    config = make_config(max_model_len=2**23, additional_config={"sepllm": sepllm})
    assert config.model_config.max_model_len == 2**23
    (_, _), (level, line) = said
    assert "texts of up to 8388608 tokens" in line
    if cache is not None:
        assert level == "info_once"
        assert f"in {cache} of the model's 2048 positions" in line
    else:
        assert level == "warning_once"
        assert "2048 positions hold what is kept of about" in line
        only = "max_separator_tokens" if "policy" not in options else "interval"  # it has no bound
        assert f"tokens: {'set' if 'policy' not in options else 'raise'} {only}" in line


def test_lengths_that_are_as_ever():
    """Not given, short, or with positions of the text."""
    sepllm = {"position_mode": "cache", "max_separator_tokens": 2000}
    for length in (None, 2048, 700):
        config = make_config(max_model_len=length, additional_config={"sepllm": sepllm})
        assert config.model_config.max_model_len == (length or 2048)
    for arguments in (
        {"additional_config": {"sepllm": {"max_separator_tokens": 64}}},
        {"additional_config": {"sepllm": {"position_mode": "cache"}}, "attention_backend": None},
        {"additional_config": {"sepllm": {"position_mode": "no such"}}},
    ):
        with pytest.raises(ValueError, match="VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
            make_config(max_model_len=4096, **arguments)
    sepllm["oops"] = 1
    with pytest.raises(ValueError, match="unknown SepLLM option 'oops'"):
        make_config(max_model_len=4096, additional_config={"sepllm": sepllm})


MISPLACED = [{"window_size": 64}, {"SepLLM": {"window_size": 64}}, {"sepllm ": {}}]


@pytest.mark.parametrize("additional", MISPLACED, ids=str)
def test_misplaced_options(additional):
    message = refusal(additional_config=additional)
    assert f"has the key {next(iter(additional))!r}" in message
    assert 'options belong under {"sepllm": {"window_size": 64}}' in message


def test_options_of_a_backend_that_is_not_selected_are_warned_of(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sepllm.engine.startup import settings

    said = []
    monkeypatch.setattr(settings.logger, "warning_once", said.append)
    args = {"model": MODEL, "max_model_len": 512}
    EngineArgs(**args, additional_config={"other": 1}).create_engine_config()
    assert said == []
    EngineArgs(**args, additional_config={"sepllm": {}}).create_engine_config()
    assert len(said) == 1
    assert "--attention-backend sepllm" in said[0]


ENGINE = [
    ({"block_size": 24}, "block_size=24: must be a multiple of 16"),
    (
        {"block_size": 48, "additional_config": {"sepllm": {"dense_layers": [0]}}},
        "block_size=48: must be a multiple of 32 with dense_layers",
    ),
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is not supported on CPU"),
    ({"runner": "pooling", "convert": "embed"}, "is run for pooling"),
    ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager=True"),
    (
        {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}},
        "ec_connector='ECExampleConnector'",
    ),
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "kv_connector='ExampleConnector'",
    ),
    ({"kv_offloading_size": 1.0}, "kv_offloading_size=1.0"),
    ({"enable_prompt_embeds": True}, "enable_prompt_embeds=True"),
    ({"skip_tokenizer_init": True}, "skip_tokenizer_init=True"),
    ({"worker_cls": "my.Worker"}, "worker_cls='my.Worker'"),
    ({"scheduler_cls": "my.Scheduler"}, "scheduler_cls='my.Scheduler'"),
    (
        {
            "speculative_config": {
                "method": "draft_model",
                "model": MODEL,
                "num_speculative_tokens": 2,
            }
        },
        "method='draft_model' is not supported yet: use 'ngram'",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), ENGINE, ids=lambda x: str(x)[:30])
def test_engine_options(options, sentence):
    if "kv_transfer_config" in options:
        from vllm.config import KVTransferConfig

        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    assert sentence in refusal(**options)


def test_a_cache_of_another_float_type():
    """From 0.33 on vLLM refuses this itself, before it asks the platform."""
    from vllm.engine.arg_utils import EngineArgs

    args = {"model": MODEL, "attention_backend": "sepllm", "max_model_len": 512}
    both = r"""kv_cache_dtype=['"]bfloat16['"] is (not supported|incompatible) .*float32"""
    with pytest.raises(ValueError, match=both):
        EngineArgs(**args, kv_cache_dtype="bfloat16", dtype="float32").create_engine_config()


def test_a_model_that_groups_its_own_kv_cache(monkeypatch):
    """vLLM 0.33 asks the model, 0.32 has no such property."""
    from vllm.config import ModelConfig

    from vllm_sepllm.engine.compat import groups_own_kv_cache

    as_in_0_32 = SimpleNamespace()
    as_in_0_33 = SimpleNamespace(supports_kv_cache_grouping=False)
    assert not groups_own_kv_cache(as_in_0_32)
    assert not groups_own_kv_cache(as_in_0_33)
    monkeypatch.setattr(ModelConfig, "supports_kv_cache_grouping", True, raising=False)
    assert "groups its layers' KV caches in its own way: use another" in refusal()


def test_kv_cache_events():
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    assert "enable_kv_cache_events=True" in refusal(kv_events_config=events)


def test_decode_context_parallelism():
    message = refusal(decode_context_parallel_size=2, tensor_parallel_size=8)
    assert "decode_context_parallel_size=2" in message


@pytest.mark.parametrize("method", ["eagle", "eagle3", "medusa", "suffix", "mtp", "draft_model"])
def test_methods_of_speculation(method):
    """All but ngram; which of them vLLM would take by itself differs by model."""
    config = make_config()
    config.speculative_config = SimpleNamespace(method=method)
    [sentence] = checks._parallel_refusals(config, _cpu())
    assert f"method={method!r} is not supported yet: use 'ngram'" in sentence
    config.speculative_config = SimpleNamespace(method="ngram")
    assert not [*checks._parallel_refusals(config, _cpu())]


def test_context_parallelism_of_prompts():
    config = make_config()
    config.parallel_config.prefill_context_parallel_size = 2
    [sentence] = checks._parallel_refusals(config, _cpu())
    assert "prefill_context_parallel_size=2 splits a request's pages over ranks" in sentence


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("is_mm_prefix_lm", True, "attends to its prefix in both directions"),
        ("attention_chunk_size", 64, "uses chunked or reference-window attention of its own"),
        ("rswa_window", 64, "uses chunked or reference-window attention of its own"),
    ],
)
def test_attention_of_other_kinds(monkeypatch, name, value, sentence):
    from vllm.config import ModelConfig

    config = make_config()
    assert hasattr(config.model_config, name)
    monkeypatch.setattr(ModelConfig, name, value, raising=False)
    vars(config.model_config).pop(name, None)
    [said] = checks._model_refusals(config, _cpu())
    assert sentence in said


def test_pipeline_stages_without_compilation():
    """With any attention the first request would end the engine, after a start without a word."""
    message = refusal(pipeline_parallel_size=2, enforce_eager=True)
    assert "pipeline_parallel_size=2 without compilation" in message
    assert "leave out enforce_eager" in message
    message = refusal(pipeline_parallel_size=2, enable_lora=True)
    assert "pipeline_parallel_size=2 without compilation" in message


def test_pipeline_stages_with_drafts():
    config = make_config()
    config.parallel_config.pipeline_parallel_size = 2
    assert not [*checks._parallel_refusals(config, _cpu())]
    config.speculative_config = SimpleNamespace(method="ngram")
    [sentence] = checks._parallel_refusals(config, _cpu())
    assert "pipeline_parallel_size=2 with speculative decoding gives wrong tokens" in sentence


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
MODELS = {
    "sliding": (
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "head_dim": 16,
            "sliding_window": 128,
        },
        "every layer of",
    ),
    "latent": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        "multi-head latent attention",
    ),
    "encoder-only": (
        {"architectures": ["BertModel"], "model_type": "bert", "num_key_value_heads": 4},
        "only 'decoder' is served",
    ),
    "encoder-decoder": (
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_target_positions": 512,
            "is_encoder_decoder": True,
        },
        "encoder-decoder",
    ),
    "head size": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 24},
        "heads of size 24, must be one of 32, 64,",
    ),
    "state space": (
        {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "state_size": 8,
            "intermediate_size": 128,
            "time_step_rank": 4,
        },
        "has attention of type 'attention_free', only 'decoder' is served",
    ),
    "hybrid": (
        {
            "architectures": ["JambaForCausalLM"],
            "model_type": "jamba",
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
        },
        "has attention of type 'hybrid', only 'decoder' is served",
    ),
    "alibi": (
        {
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "n_layer": 2,
            "n_head": 4,
        },
        "ALiBi",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind, tmp_path):
    extra, sentence = MODELS[kind]
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **extra}))
    if kind == "encoder-decoder":
        write_whisper_files(tmp_path)
    # The demo model's tokenizer serves; refusals do not look at it.
    message = refusal(model=str(tmp_path), tokenizer=MODEL, max_model_len=256)
    assert sentence in message
    assert "use another attention backend" in message


def write_whisper_files(path):
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor().save_pretrained(path)


@pytest.mark.parametrize(
    ("asked", "space", "counts"),
    [
        (1 << 28, "1", 1 << 30),  # both, and they differ
        (1 << 30, "1", 1 << 30),
        (1 << 28, "", 1 << 28),  # vLLM takes an empty one for none
        (1 << 28, None, 1 << 28),
        (None, "1", 1 << 30),
    ],
)
def test_two_sizes_of_the_kv_cache_are_warned_of(monkeypatch, asked, space, counts):
    """vLLM's CPU platform takes the environment's, without a word."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sepllm.engine.cpu import platform

    said = []
    monkeypatch.setattr(
        platform.logger, "warning_once", lambda text, *args: said.append(text % args)
    )
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    if space is not None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    args = {"model": MODEL, "max_model_len": 512, "kv_cache_memory_bytes": asked}
    config = EngineArgs(**args, attention_backend="sepllm").create_engine_config()
    assert config.cache_config.kv_cache_memory_bytes == counts
    config.__post_init__()  # as the engine's process does; it has nothing to add
    assert said == (
        [
            f"VLLM_CPU_KVCACHE_SPACE={space} in the environment counts ({counts} bytes of KV "
            f"cache), and kv_cache_memory_bytes={asked} does not: unset one of the two"
        ]
        if asked is not None and asked != counts
        else []
    )
    said.clear()
    assert EngineArgs(**args).create_engine_config().cache_config.kv_cache_memory_bytes == counts
    assert said == [], "another backend"


def test_good_configurations_are_completed():
    from vllm.engine.arg_utils import EngineArgs

    args = {"model": MODEL, "attention_backend": "sepllm", "dtype": "float32"}
    config = EngineArgs(**args, additional_config={"other": 1}).create_engine_config()
    assert config.cache_config.block_size == 32
    assert config.cache_config.enable_prefix_caching
    assert config.additional_config["other"] == 1
    assert len(config.additional_config["sepllm"]["keep"]) == 9
    assert json.dumps(config.additional_config, sort_keys=True)
    own = EngineArgs(**args, block_size=64).create_engine_config()
    assert own.cache_config.block_size == 64
