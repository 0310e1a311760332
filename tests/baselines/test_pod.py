"""PoD against full attention, a loop over tokens, and what must have no gradient."""

import math

import pytest
import torch
from small_models import ARCHITECTURES, make_ids, make_model

from vllm_sepllm.baselines import pod
from vllm_sepllm.baselines.pod import apply_pod, make_blocks, own_keys, similarities

pytestmark = pytest.mark.training

LAYERS, KV_HEADS = 3, 2
SHARED = [[0, 0], [0, 1], [0, 1]]  # of the small models: one head in one block, one in two


def kv_heads(model):
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_of_one_layer_are_full_attention(architecture):
    """To the bit, in float32."""
    model = make_model(architecture, attn_implementation="eager").float()
    ids = torch.tensor(make_ids(30, 30))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        apply_pod(model, own_keys(LAYERS, kv_heads(model)))
        assert torch.equal(model(input_ids=ids).logits, expected)
        # Nothing is distant.
        heads = kv_heads(model)
        state = apply_pod(model, [[0] * heads] * LAYERS, num_sink_tokens=0, recent=30)
        assert torch.equal(model(input_ids=ids).logits, expected)
        apply_pod(model, [[0] * heads] * LAYERS, num_sink_tokens=0, recent=10)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
    assert state.saved == pytest.approx((1 - 1 / 3) / 2)


def test_attention_is_that_of_a_loop():
    """Four query heads on two KV heads, near and distant tokens, one query at a time."""
    torch.manual_seed(0)
    state = pod.SharedKeys(((0, 0), (0, 1)), num_sink_tokens=2, recent=3)
    query, key, value = (torch.randn(2, 1, n, 9, 8, dtype=torch.float64) for n in (4, 2, 2))
    for layer in range(2):
        found = pod._attend(state, layer, query[layer], key[layer], value[layer], 8**-0.5)
    for head in range(4):
        kv = head // 2
        bottom = state.blocks[1][kv]
        for i in range(9):
            weights = []
            for j in range(i + 1):
                near = j < 2 or i - j < 3
                keys = key[1 if near else bottom]
                weights.append(float(query[1, 0, head, i] @ keys[0, kv, j]) / math.sqrt(8))
            expected = (
                torch.tensor(weights, dtype=torch.float64).softmax(0) @ value[1, 0, kv, : i + 1]
            )
            assert torch.allclose(found[0, i, head], expected, atol=1e-12)


def test_distant_keys_of_other_layers_have_no_gradient():
    torch.manual_seed(0)
    state = pod.SharedKeys(((0, 0), (0, 1)), num_sink_tokens=2, recent=3)
    key = torch.randn(2, 1, 2, 9, 8, requires_grad=True)
    query, value = torch.randn(2, 1, 4, 9, 8), torch.randn(2, 1, 2, 9, 8)
    for layer in range(2):
        found = pod._attend(state, layer, query[layer], key[layer], value[layer], 8**-0.5)
    found[0, -1].sum().backward()  # what the last token of the second layer attends to
    distant = slice(2, 6)  # behind the sinks, before the recent ones
    assert not key.grad[1, 0, 0, distant].any(), "the second layer's own, in a block of two"
    assert key.grad[0, 0, 0, distant].all()
    assert key.grad[1, 0, 1, distant].all(), "the other head is a block of its own"
    assert not key.grad[0, 0, 1].any()
    assert key.grad[1, 0, 0, 6:].all()


def test_it_can_be_generated_with():
    """With a cache, and without."""
    model = make_model()
    apply_pod(model, SHARED, num_sink_tokens=2, recent=5)
    ids = torch.tensor(make_ids(20))
    found = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits = model(input_ids=found, use_cache=False).logits
    assert logits[0, 19:-1].argmax(-1).tolist() == found[0, 20:].tolist()


def test_similarities():
    """A layer is like itself; probabilities that share nothing are 0 alike."""
    found = similarities(make_model(), make_ids(40, 50), last=8)
    assert found.shape == (LAYERS, LAYERS, KV_HEADS)
    assert torch.allclose(found.diagonal(), torch.ones(KV_HEADS, LAYERS), atol=1e-5)
    assert torch.allclose(found, found.transpose(0, 1), atol=1e-5)
    assert ((found[~torch.eye(LAYERS, dtype=torch.bool)] < 1) & (found.min() >= 0)).all()
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert pod._divergence(a, b).item() == pytest.approx(1)
    assert pod._divergence(a, a).item() == pytest.approx(0, abs=1e-6)
    half = pod._divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])).item()
    assert half == pytest.approx(0.5 * (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5))


def test_blocks_are_greedy():
    """By hand: layer 2 is like layer 1 and not like layer 0, so it begins a block."""
    alike = torch.eye(4)[:, :, None].repeat(1, 1, 2)
    for a, b, head in ((0, 1, 0), (1, 2, 0), (2, 3, 0), (0, 1, 1), (0, 2, 1), (1, 2, 1), (1, 3, 1)):
        alike[a, b, head] = alike[b, a, head] = 0.6
    assert make_blocks(alike, 0.5) == ((0, 0), (0, 0), (2, 0), (2, 3))
    assert make_blocks(alike, 0.7) == own_keys(4, 2)
    assert make_blocks(alike, 0.0) == ((0, 0),) * 4


@pytest.mark.parametrize(
    ("blocks", "more", "part"),
    [
        ([[0, 0]], {}, "blocks of 1 layers: must name a layer for each of 3 layers and 2 KV heads"),
        ([[0, 0], [0, 2], [0, 0]], {}, r"blocks\[1\]\[1\]=2: must be the layer itself"),
        ([[0, 0], [0, 0], [1, 0]], {}, r"blocks\[2\]\[0\]=1"),
        (SHARED, {"recent": 0}, "recent=0"),
    ],
)
def test_refused(blocks, more, part):
    with pytest.raises(ValueError, match=part):
        apply_pod(make_model(), blocks, **more)
