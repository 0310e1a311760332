"""Rotary embeddings without a table: vLLM's own at positions it has, exact at all others."""

import math

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.worker.rotary import (
    LongRotaryEmbedding,
    Rotation,
    prepare_cache_positions,
    rotations_of,
)

pytestmark = pytest.mark.engine

LENGTH, HEAD_SIZE = 512, 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
KINDS = {
    "plain": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
}


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    from vllm.platforms import current_platform

    current_platform.import_kernels()


@pytest.fixture
def make_rope(default_vllm_config):
    from vllm.model_executor.layers.rotary_embedding import get_rope

    def make(kind, is_neox=True, dtype=torch.float32):
        options = {"rope_theta": 10000.0, **(KINDS[kind] if isinstance(kind, str) else kind)}
        return get_rope(HEAD_SIZE, LENGTH, is_neox, rope_parameters=options, dtype=dtype)

    return make


@pytest.fixture
def default_vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def vectors(num_tokens, num_heads, dtype=torch.float32):
    rng = torch.Generator().manual_seed(num_heads)
    return torch.randn(num_tokens, num_heads * HEAD_SIZE, generator=rng).to(dtype)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_embedding_is_vllms_where_that_has_positions(make_rope, kind, is_neox, dtype):
    original = make_rope(kind, is_neox, dtype)
    long = LongRotaryEmbedding(original, *rotations_of(original))
    positions = torch.tensor([0, 1, 2, 100, 7, LENGTH - 1])
    query, key = vectors(6, 4, dtype), vectors(6, 2, dtype)
    expected = original(positions, query.clone(), key.clone())
    found = long(positions, query.clone(), key.clone())
    # Angles of vLLM's table are rounded to float32, once as a product and once as a cosine.
    bound = LENGTH * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        largest = float(theirs.float().abs().max())
        assert (ours.float() - theirs.float()).abs().max() <= 2 * bound * largest
    assert not torch.allclose(found[0].float(), query.float(), atol=0.1)
    alone, none = long(positions, query.clone())
    assert none is None
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("position", [2**23 - 1, 2**22 + 1, 12_345_678 % 2**23])
def test_angles_are_exact_at_any_position(make_rope, position):
    [rotation] = rotations_of(make_rope("plain"))
    rows = rotation.cos_sin(torch.tensor([position, -position]))
    half = HEAD_SIZE // 2
    eps = torch.finfo(torch.float32).eps
    for pair in range(half):
        angle = position * float(rotation.inv_freq[pair])
        expected = math.cos(angle), math.sin(angle)
        assert abs(float(rows[0, pair]) - expected[0]) <= eps
        assert abs(float(rows[0, half + pair]) - expected[1]) <= eps
        assert abs(float(rows[1, half + pair]) + expected[1]) <= eps
    table = torch.tensor([float(position)]) * rotation.inv_freq.float()
    assert (table.cos() - rows[0, :half]).abs().max() > 1e-3, "a float32 table would do"


def test_differences_are_all_that_matters(make_rope):
    """At the end of eight million positions as at the beginning."""
    original = make_rope("plain")
    long = LongRotaryEmbedding(original, *rotations_of(original))
    query, key = vectors(2, 1).split(1)

    def product(start):
        positions = torch.tensor([start + 37]), torch.tensor([start])
        rotated = (long(p, x.clone())[0] for p, x in zip(positions, (query, key), strict=True))
        return float((next(rotated) * next(rotated)).sum())

    rounding = 8 * torch.finfo(torch.float32).eps * float(query.norm() * key.norm())
    assert abs(product(2**23 - 64) - product(0)) <= rounding


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_is_the_definition(is_neox, dtype):
    inv_freq = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)  # 2 of 8 elements stay
    rotation = Rotation(inv_freq, is_neox)
    positions = torch.tensor([3, -5])
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = torch.tensor([1, 0, 0, 1])
    before = x.clone()
    rotated = rotation.rotate(x, rotation.cos_sin(positions), index)
    assert torch.equal(x, before)
    assert rotated.dtype == dtype
    for i in range(4):
        for head in range(2):
            expected = x[i, head].double().clone()
            for pair in range(3):
                angle = float(positions[index[i]] * inv_freq[pair])
                a, b = (pair, pair + 3) if is_neox else (2 * pair, 2 * pair + 1)
                u, v = float(x[i, head, a]), float(x[i, head, b])
                expected[a] = u * math.cos(angle) - v * math.sin(angle)
                expected[b] = v * math.cos(angle) + u * math.sin(angle)
            error = (rotated[i, head].double() - expected).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "DynamicNTKScalingRotaryEmbedding"),
        ({"rope_type": "default", "mrope_section": [8, 4, 4]}, "MRotaryEmbedding"),
    ],
)
def test_unknown_kinds_are_refused(make_rope, options, name):
    with pytest.raises(ConfigError, match=f"does not know the rotary embedding {name}"):
        rotations_of(make_rope(options))


class FakeAttention(nn.Module):
    """Stands for vLLM's attention layer."""

    head_size, layer_name = HEAD_SIZE, "layers.0.attn"

    class impl:  # noqa: N801
        rotation = "unset"


class Block(nn.Module):
    """An attention module as models have them."""

    def __init__(self, rotary_emb, change=lambda key, positions: key, rotates=True):
        super().__init__()
        self.rotary_emb, self.attn = rotary_emb, FakeAttention()
        self.attn.impl = type("Impl", (), {"rotation": "unset"})()
        self._change, self._rotates = change, rotates
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, positions, hidden_states):
        query, key = hidden_states.clone(), hidden_states.clone()
        if self._rotates:
            query, key = self.rotary_emb(positions, query, key)
        return self.attn(query, self._change(key, positions), hidden_states)


@pytest.fixture
def prepare(monkeypatch):
    from vllm_sepllm.engine.worker import rotary

    monkeypatch.setattr(rotary, "Attention", FakeAttention)

    def prepare(*blocks, size=2 * HEAD_SIZE):
        prepare_cache_positions(nn.ModuleList(blocks), size, torch.float32)
        return [block.attn.impl.rotation for block in blocks]

    return prepare


def test_layers_share_one_embedding(make_rope, prepare):
    original = make_rope("yarn")
    blocks = [Block(original), Block(original)]
    first, second = prepare(*blocks)
    assert first is second
    assert blocks[0].rotary_emb is blocks[1].rotary_emb
    assert isinstance(blocks[0].rotary_emb, LongRotaryEmbedding)
    assert isinstance(blocks[0].attn, FakeAttention)
    assert make_rope("yarn") is original, "models of this process share it"


def test_layers_without_rotation_are_left_alone(make_rope, prepare):
    """Some models have an embedding in every layer and use it in some."""
    found = prepare(
        Block(make_rope("plain")),
        Block(make_rope("plain"), rotates=False),
        Block(None, rotates=False),
    )
    assert isinstance(found[0], Rotation)
    assert found[1:] == [None, None]


class Absolute(Block):
    """Of a model that adds positions to its embeddings."""

    def forward(self, hidden_states):
        raise AssertionError("it was asked")


class ReadsTables(Block):
    """Takes its angles from the embedding's table, as a fused kernel does."""

    def forward(self, positions, hidden_states):
        table = self.rotary_emb.cos_sin_cache
        key, _ = RotaryEmbedding.forward_static(
            positions, hidden_states, None, HEAD_SIZE, table.shape[1], table, True
        )
        return self.attn(hidden_states, key, hidden_states)


def test_models_that_read_tables_are_refused(make_rope, prepare):
    with pytest.raises(ConfigError, match=r"cannot see how layers\.0\.attn.*no attribute 'cos_sin"):
        prepare(ReadsTables(make_rope("plain")))


def test_models_without_rotary_embeddings_are_refused(make_rope, prepare):
    with pytest.raises(ConfigError, match="this model has no rotary embeddings"):
        prepare(Absolute(None))
    with pytest.raises(ConfigError, match="this model has no rotary embeddings"):
        prepare(Block(None, rotates=False))


class Unknown(nn.Module):
    """A rotary embedding that is none of vLLM's usual ones."""

    def forward(self, positions, query, key):
        return query, key * positions[:, None].cos()


def test_embeddings_of_another_kind_are_refused(make_rope, prepare):
    with pytest.raises(ConfigError, match=r"layers\.0\.attn does more to its keys, or another"):
        prepare(Block(make_rope("plain")), Block(Unknown()))


@pytest.mark.parametrize(
    "change",
    [
        lambda key, positions: key * torch.linspace(0.2, 2, key.shape[1]),  # a norm's weight
        lambda key, positions: key * (1 + positions[:, None] / 50),
        lambda key, positions: key * 0,
    ],
)
def test_keys_changed_in_other_ways_are_refused(make_rope, prepare, change):
    block = Block(make_rope("plain"), change)
    with pytest.raises(ConfigError, match=r"layers\.0\.attn does more to its keys"):
        prepare(block)
    assert isinstance(block.attn, FakeAttention)


def test_modules_that_cannot_be_asked_are_refused(make_rope, prepare):
    with pytest.raises(ConfigError, match=r"cannot see how layers\.0\.attn rotates its keys"):
        prepare(Block(make_rope("plain")), size=HEAD_SIZE + 1)
    block = Block(make_rope("plain"))
    block.second = make_rope("linear")
    with pytest.raises(ConfigError, match="finds 2 rotary embeddings for"):
        prepare(block)
