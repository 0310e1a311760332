"""SF-Attn against an explicit mask of each head, and against LongLoRA's own way of computing it."""

import math

import pytest
import torch
from small_models import bias_of, make_ids, make_model

from vllm_sepllm.config import ConfigError
from vllm_sepllm.training import apply, apply_sink_lora

pytestmark = pytest.mark.training

EQUAL = 1e-9


def head_masks(num_tokens, num_heads, num_shifted, group, sinks):
    """``[heads, queries, keys]``, written down from the definition."""
    masks = torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.bool)
    for head in range(num_heads):
        shift = group // 2 if head >= num_heads - num_shifted else 0
        for query in range(num_tokens):
            for key in range(query + 1):
                together = (query + shift) // group == (key + shift) // group
                masks[head, query, key] = together or key < sinks
    return masks


@pytest.mark.parametrize(
    ("architecture", "share", "sinks"),
    [
        ("Llama", 0.5, 4),
        ("GPTNeoX", 1 / 6, 3),
        ("GPTNeoX", 0.5, 0),
        ("Llama", 0, 4),
        ("Llama", 1, 2),
    ],
)
def test_every_heads_mask(architecture, share, sinks):
    """Logits and gradients; of Llama's heads three share a KV head."""
    plain, model = make_model(architecture), make_model(architecture)
    apply_sink_lora(model, 40, share, sinks)
    [ids] = make_ids(130)
    masks = head_masks(130, 6, round(6 * share), 40, sinks)
    given = torch.tensor([ids])
    wanted = plain(input_ids=given, attention_mask=bias_of(masks)[0]).logits
    found = model(input_ids=given).logits
    assert (found - wanted).abs().max() < EQUAL
    for logits in (found, wanted):
        logits.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < EQUAL * theirs.grad.norm(), name


def test_no_later_token_moves_an_earlier_logit():
    model = make_model()
    apply_sink_lora(model, 40, 0.5)
    first, second = make_ids(100, 100)
    changed = torch.tensor([[*first[:60], *second[60:]]])
    found = model(input_ids=torch.tensor([first])).logits, model(input_ids=changed).logits
    assert torch.equal(found[0][:, :60], found[1][:, :60])
    assert not torch.equal(found[0][:, 60:], found[1][:, 60:])


def test_packed_texts_have_groups_of_their_own():
    model = make_model()
    apply_sink_lora(model, 20, 0.5)
    texts = make_ids(50, 70)
    row = torch.tensor([[*texts[0], *texts[1]]])
    positions = torch.tensor([[*range(50), *range(70)]])
    found = model(input_ids=row, position_ids=positions).logits[0]
    alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in texts]
    assert (found - torch.cat(alone)).abs().max() < EQUAL


def longlora(query, key, value, group):
    """S2-Attn as its authors compute it (arXiv 2309.12307, algorithm 1): half of the heads are
    rolled by half a group, all attend causally within groups, and are rolled back.
    ``[tokens, heads, size]``."""
    half = query.shape[1] // 2

    def rolled(tensor, by):
        return torch.cat([tensor[:, :half], tensor[:, half:].roll(by, 0)], 1)

    parts = [rolled(t, -(group // 2)).unflatten(0, (-1, group)) for t in (query, key, value)]
    logits = torch.einsum("gqhd,gkhd->ghqk", parts[0], parts[1]) / math.sqrt(query.shape[2])
    causal = torch.ones(group, group, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -math.inf).softmax(-1)
    output = torch.einsum("ghqk,gkhd->gqhd", weights, parts[2]).flatten(0, 1)
    return rolled(output, group // 2)


def test_s2_attention_is_longloras():
    """All but the first half group of shifted heads, which in theirs sees the end of the text."""
    from vllm_sepllm.layers import LayerPlan
    from vllm_sepllm.training.attention import sepllm_attention
    from vllm_sepllm.training.sink_lora import GroupPattern
    from vllm_sepllm.training.step import Step

    group, length = 32, 128
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(length, 6, 8, generator=rng, dtype=torch.float64) for _ in range(3)]
    given = {"input_ids": torch.tensor(make_ids(length))}
    step = Step.of(GroupPattern(group, 0.5, 0), LayerPlan(), 3, given)
    layer = make_model("GPTNeoX").get_decoder().layers[0].attention
    heads = [tensor.transpose(0, 1)[None] for tensor in tensors]
    found = sepllm_attention(layer, *heads, None, sepllm_step=step)[0][0]
    wanted = longlora(*tensors, group)
    assert (found[:, :3] - wanted[:, :3]).abs().max() < 1e-12
    assert (found[group // 2 :] - wanted[group // 2 :]).abs().max() < 1e-12
    assert (found[: group // 2, 3:] - wanted[: group // 2, 3:]).abs().max() > 0.1


def test_taken_out_it_is_full_attention_again():
    plain, model = make_model(), make_model()
    attached = apply_sink_lora(model, 20, 0.5)
    [ids] = make_ids(90)
    given = torch.tensor([ids])
    with pytest.raises(ValueError, match="before you generate"):
        model.generate(given, max_new_tokens=3, pad_token_id=0)
    attached.remove()
    assert torch.equal(model(input_ids=given).logits, plain(input_ids=given).logits)
    apply(model, {"separator_token_ids": [3]})
    assert model.config.sepllm
    apply_sink_lora(model, 20, 0.5)
    assert not hasattr(model.config, "sepllm"), "the rule of an earlier training"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group_size": 33}, "must be even; set 34"),
        ({"group_size": 0}, "at least 2 tokens"),
        ({"group_size": 32}, "of 2 KV heads is 0.5: it must be a whole number"),
        ({"group_size": 32, "shifted_share": 1.5}, "must be from 0 to 1"),
        ({"group_size": 32, "shifted_share": "0.5"}, "shifted_share='0.5': must be from 0 to 1"),
        ({"group_size": 32, "shifted_share": 0.5, "num_sink_tokens": -1}, "at least 0"),
        ({"group_size": 32, "shifted_share": 0.5, "num_sink_tokens": 4.5}, "a whole number"),
    ],
)
def test_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        apply_sink_lora(make_model(), **options)


def test_refused_models():
    with pytest.raises(ConfigError, match="have a sliding window"):
        apply_sink_lora(make_model("Mistral", sliding_window=16), 32, 0.5)


def test_a_vocabulary_may_grow():
    """What is seen does not depend on ids."""
    model = make_model()
    apply_sink_lora(model, 32, 0.5)
    given = torch.tensor(make_ids(70))
    wanted = model(input_ids=given).logits
    model.resize_token_embeddings(128)
    assert torch.equal(model(input_ids=given).logits[..., : wanted.shape[-1]], wanted)


def test_a_third_of_the_heads():
    """As the sentence writes it that says which shares there are."""
    model = make_model(num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ConfigError, match=r"e\.g\. shifted_share=0\.333333"):
        apply_sink_lora(model, 32)
    pattern = apply_sink_lora(model, 32, 0.333333).pattern
    assert pattern.heads(3) == (slice(0, 2), slice(2, 3))
