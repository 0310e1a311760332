"""Bytes of KV cache, as a model's ``config.json`` says."""

import json

import pytest
from helpers import MODEL

from vllm_sepllm.cli.inspection_memory import KVShape, kv_bytes, read_shape, shape_of

pytestmark = pytest.mark.unit

LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


def test_a_token_of_llama_3_takes_128_kib():
    shape = shape_of(LLAMA)
    assert shape == KVShape(num_layers=32, num_kv_heads=8, head_dim=128, element_bytes=2)
    assert kv_bytes(shape, 1) == 128 * 1024
    assert kv_bytes(shape, 32) == 4 * 2**20
    assert kv_bytes(shape, 32, num_layers=8) == 2**20
    assert kv_bytes(shape, 0) == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_key_value_heads": None}, KVShape(32, 32, 128, 2)),
        ({"head_dim": 64}, KVShape(32, 8, 64, 2)),
        ({"torch_dtype": "float32"}, KVShape(32, 8, 128, 4)),
        ({"dtype": "torch.float16"}, KVShape(32, 8, 128, 2)),
        ({"sliding_window": 4096, "use_sliding_window": False}, KVShape(32, 8, 128, 2)),
        ({"layer_types": ["full_attention"] * 32}, KVShape(32, 8, 128, 2)),
    ],
)
def test_what_a_config_may_say(change, expected):
    assert shape_of(LLAMA | change) == expected


def test_a_text_model_inside_another_one():
    inner = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    assert shape_of({"text_config": inner, "dtype": "float32"}) == KVShape(32, 8, 128, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lora_rank": 512},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"num_hidden_layers": 0},
        {"num_key_value_heads": ..., "num_kv_heads": 8},
        {"num_key_value_heads": ..., "multi_query": True},
    ],
)
def test_caches_of_another_kind(change):
    changed = {key: value for key, value in {**LLAMA, **change}.items() if value is not ...}
    assert shape_of(changed) is None


def test_the_folder_of_the_demo_model():
    assert read_shape(MODEL) == KVShape(6, 4, 32, 2)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        '"text"',
        json.dumps(LLAMA | {"torch_dtype": "int8"}),
        json.dumps(LLAMA | {"num_attention_heads": "many"}),
        json.dumps({key: value for key, value in LLAMA.items() if key != "hidden_size"}),
    ],
)
def test_a_folder_that_does_not_say(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert read_shape(str(tmp_path)) is None


def test_a_name_on_the_hub_is_no_folder():
    assert read_shape("HuggingFaceTB/SmolLM2-135M-Instruct") is None
