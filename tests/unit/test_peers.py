"""``benchmarks/peers.py``: methods of kvpress get as much KV as what they stand beside."""

import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.material import Suite, make_material, package_text
from vllm_sepllm.evaluation.share import num_attended
from vllm_sepllm.evaluation.ways import FACTS, SEPLLM, make_ways

pytestmark = pytest.mark.unit

LAYERS = 6


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import peers

    sys.path.remove(str(ROOT / "benchmarks"))
    return peers


def evaluation_of(tokenizer, window, length):
    suite = Suite(2, length, (500,), 1, 1)
    material = make_material(tokenizer, [package_text()], suite)
    options = {SEPLLM: {"window_size": window}, FACTS: {"preset": "facts", "window_size": window}}
    return SimpleNamespace(material=material, ways=make_ways(options, material, tokenizer, LAYERS))


@pytest.mark.parametrize("length", [600, 3000])
def test_budgets(peers, tokenizer, length):
    """Kept and predicted tokens come to what SepLLM attends to, counted one by one."""
    evaluation = evaluation_of(tokenizer, 250, length)
    predicted = peers.num_predicted(evaluation)
    assert predicted == min(256, length // 4)
    found = peers.budgets(evaluation, tokenizer)
    for name, options in ((SEPLLM, {}), (FACTS, {"preset": "facts"})):
        config = SepLLMConfig.from_dict({**options, "window_size": 250})
        attended = [
            num_attended(config, tokenizer, text[:at])
            for text in evaluation.material.texts
            for at in range(length - predicted, length, 7)
        ]
        mean = found[name]["texts"] + (predicted - 1) / 2
        assert mean == pytest.approx(sum(attended) / len(attended), rel=0.02)
        for group, prompts in evaluation.material.groups.items():
            [prompt] = prompts
            assert found[name][group] == pytest.approx(
                num_attended(config, tokenizer, prompt), abs=1
            )


def test_a_window_that_is_too_narrow(peers, tokenizer):
    with pytest.raises(SystemExit, match="SepLLM attends to too little for 100 tokens"):
        peers.budgets(evaluation_of(tokenizer, 4, 400), tokenizer)


def test_rows(peers):
    """Who wins is said where it is more than chance, and nothing where nothing is compared."""
    clear = {"nats": {"mean": -0.1, "error": 0.01, "blocks": 8}, "only_ours": 1, "only_theirs": 9}
    rows = [
        {"name": "full attention", "kv_of": None, "perplexity": 20.0},
        {"name": SEPLLM, "kv_of": SEPLLM, "perplexity": 22.0},
        {"name": "kvpress: x", "kv_of": SEPLLM, "perplexity": 21.0, "beside": clear},
        {"name": "kvpress: y", "kv_of": FACTS, "perplexity": 21.0, "beside": clear},
    ]
    for row, chance in zip(rows, (1, 1, 0.02, 0.2), strict=True):
        row |= {"document": [3, 18], "chat": [1, 9]}
        if "beside" in row:
            row["beside"] = {**row["beside"], "chance": chance}
    lines = peers.table(rows).splitlines()
    assert lines[2] == "| full attention | 20.00 | 3 of 18 | 1 of 9 |  |"
    assert lines[4].endswith("| ours predicts better, theirs answers more |")
    assert lines[5].endswith("| ours predicts better |")
    assert "With 2 rows and two figures each" in " ".join(lines)
