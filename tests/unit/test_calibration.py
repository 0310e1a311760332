"""Lists of what is attended to from far: beside a model's own attention, and by hand."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_sepllm.evaluation.calibration import (
    MOST_IDS,
    OTHER,
    PRIOR,
    Received,
    keep_list,
    received_from_far,
    worths,
)

pytestmark = pytest.mark.unit

VOCABULARY, SINKS, WINDOW = 50, 3, 20


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def test_received_is_the_attention_of_the_model():
    """Transformers' own probabilities, added up one by one."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCABULARY, 300).tolist(), rng.integers(0, VOCABULARY, 90).tolist()]
    model = tiny()
    model.set_attn_implementation("eager")
    attention, pairs, counts = (np.zeros(VOCABULARY) for _ in range(3))
    for text in texts:
        with torch.inference_mode():
            found = model(torch.tensor([text]), output_attentions=True).attentions
        mean = torch.stack(found).double().mean((0, 1, 2))
        for key, token in enumerate(text):
            far = range(key + WINDOW, len(text)) if key >= SINKS else ()
            attention[token] += sum(float(mean[query, key]) for query in far)
            pairs[token] += len(far)
            counts[token] += bool(far)
    found = received_from_far(model, texts, VOCABULARY, SINKS, WINDOW)
    assert found.attention == pytest.approx(attention, abs=1e-5)
    assert found.pairs.tolist() == pairs.tolist()
    assert found.counts.tolist() == counts.tolist()


def received(*rows):
    attention, pairs, counts = map(np.array, zip(*rows, strict=True))
    return Received(attention.astype(float), pairs.astype(float), counts.astype(float))


BY_HAND = received((6, 20, 2), (0, 0, 0), (1, 100, 10), (1, 10, 1), (0, 70, 7))
CLASSES = {"digits": [0, 1, 900], "names": [1, 3]}


def test_worths_by_hand():
    found, means = worths(BY_HAND, CLASSES)
    # Id 1 was not seen, and is a digit before it is a name.
    assert means == {"digits": 0.3, "names": 0.1, OTHER: 1 / 170}
    prior = PRIOR * 10
    assert found[0] == pytest.approx((6 + prior * 0.3) / (20 + prior))
    assert found[1] == pytest.approx(0.3)
    assert found[3] == pytest.approx((1 + prior * 0.1) / (10 + prior))
    assert found[2] == pytest.approx((1 + prior / 170) / (100 + prior))
    assert found[2] > found[4] > 0


def test_lists_by_hand():
    assert keep_list(BY_HAND, CLASSES, 0.05) == (0, [])
    assert keep_list(BY_HAND, CLASSES, 0.1) == (0.1, ["digits"])
    assert keep_list(BY_HAND, CLASSES, 0.2) == (3 / 20, ["digits", "names"])
    assert keep_list(BY_HAND, CLASSES, 0.7) == (13 / 20, ["digits", "names", 2])
    assert keep_list(BY_HAND, {}, 0.7) == (13 / 20, [0, 2, 3])
    # Ids 0 and 3 are chosen. Id 4 is of a class that is worth more than id 3, and makes it half.
    assert keep_list(BY_HAND, {"names": [0, 4]}, 0.2) == (0.5, ["names", 3])
    everything = received(*[(1, 1, 1)] * (MOST_IDS + 9))
    assert len(keep_list(everything, {}, 1.0)[1]) == MOST_IDS
