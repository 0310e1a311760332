"""Operations of a training step, counted by formula and by hand."""

import pytest
import torch
import transformers
from small_models import make_ids, make_model

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.training.flops import ModelSize, causal_pairs, shares
from vllm_sepllm.training.plan import TextPlan, pack

pytestmark = pytest.mark.training


def test_a_models_size():
    """Written down from its matrices: queries, keys, values, result, and three of the MLP."""
    size = ModelSize.of(make_model())
    attention = 48 * (48 + 16 + 16) + 48 * 48
    assert size.weights == 3 * (attention + 3 * 48 * 64)
    assert (size.num_layers, size.head_weights, size.attention_size) == (3, 96 * 48, 48)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_the_counter_of_torch_agrees(architecture):
    """On a forward pass of dense attention, where torch counts every product that is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    if architecture == "GPT2":
        sizes = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 6}
        config = transformers.GPT2Config(**sizes, attn_implementation="eager")
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = make_model(attn_implementation="eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.tensor(make_ids(100)), use_cache=False)
    # Attention without fusion computes the whole square.
    ours = ModelSize.of(model).operations(100, 100 * 100) / 3
    rotary = 3 * 2 * 4 * 100  # angles of the positions, a product of matrices in Llama
    assert abs(counter.get_total_flops() - ours) <= rotary


def test_shares():
    ids = make_ids(600)[0]
    size = ModelSize(12, 85_000_000, 38_600_000, 768)
    everything = SepLLMConfig(window_size=600, separator_token_ids=(3,))
    plan = pack([TextPlan.of(ids, KeepRule.of(everything, 96))])
    assert plan.num_pairs == causal_pairs(600)
    dense = shares(size, 600, plan.num_pairs)
    assert dense["causal"] == dense["attention"] == 1
    assert 0.5 < dense["as in the paper"] < 1
    narrow = SepLLMConfig(window_size=10, num_sink_tokens=0, separator_token_ids=(3,))
    plan = pack([TextPlan.of(ids, KeepRule.of(narrow, 96))])
    seen = sum(min(q + 1, 10) + sum(ids[k] == 3 for k in range(max(0, q - 9))) for q in range(600))
    assert plan.num_pairs == seen
    assert shares(size, 600, seen)["attention"] == seen / causal_pairs(600)
