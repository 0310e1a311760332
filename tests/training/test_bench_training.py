"""The benchmark of training: what it compares computes the same, and it writes what it measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

from vllm_sepllm.training.plan import TextPlan, pack

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LENGTH = 512


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # other tests' threads
    import training

    # A GPU would compute in bfloat16, where these bounds say nothing.
    monkeypatch.setattr(training, "DEVICE", "cpu")
    monkeypatch.setattr(training, "TOKENS_OF_A_BATCH", 1)
    return training


def text_and_plan(training):
    texts = training.texts_of(training.book(), LENGTH)
    plan = pack([TextPlan.of(text, training.rule_of(64)) for text in texts], training.DEVICE)
    return torch.from_numpy(texts).to(training.DEVICE) % 4096, plan


def close(first, second):
    """Sums of at most LENGTH terms in another order, each rounded once."""
    bound = LENGTH * torch.finfo(first.dtype).eps * second.abs().max().item()
    return (first - second).abs().max().item() <= bound


def test_masked_attention_has_the_gradients_of_packed_attention_and_causal_has_others(training):
    _, plan = text_and_plan(training)
    found = {way: run() for way, run in training.attention_ways(plan, 1, 2, 64).items()}
    assert found.keys() == {training.DENSE, training.PACKED, training.MASKED}
    ways = (found[way] for way in (training.PACKED, training.MASKED, training.DENSE))
    for packed, masked, causal in zip(*ways, strict=True):
        assert close(packed, masked)
        assert not close(packed, causal)


def test_a_masked_step_has_the_loss_and_gradients_of_a_packed_step(training):
    text, plan = text_and_plan(training)
    made = []

    def make():
        made.append(training.llama_5m())
        return made[-1]

    ways = training.step_ways(make, 64, text, plan, False)
    losses = {way: run() for way, run in ways.items()}
    assert close(losses[training.PACKED], losses[training.MASKED])
    assert not close(losses[training.PACKED], losses[training.DENSE])
    gradients = {
        way: model.model.layers[0].self_attn.k_proj.weight.grad
        for way, model in zip(ways, made, strict=True)
    }
    assert close(gradients[training.PACKED], gradients[training.MASKED])
    assert not close(gradients[training.PACKED], gradients[training.DENSE])


def test_it_writes_what_it_measured(training, monkeypatch, tmp_path, capsys):
    file = tmp_path / "training.json"
    options = ["--lengths", "128", "--turns", "1", "--seconds", "0", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["training.py", *options])
    training.main()
    found = json.loads(file.read_text())
    assert found["cpu"]
    assert [row["tokens"] for row in found["attention"]] == [128]
    assert [row["model"] for row in found["steps"]][:2] == ["Llama, 5M", "Pythia-160M, 2 layers"]
    for row in found["attention"] + found["steps"]:
        assert row["seconds"].keys() == {training.DENSE, training.PACKED, training.MASKED}
        assert 0 < row["pairs"] <= 1
    assert "times faster than" in capsys.readouterr().out


def test_flex_attention_is_refused_on_a_cpu(training, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--flex"])
    with pytest.raises(SystemExit):
        training.main()
    assert "no backward pass on a CPU" in capsys.readouterr().err
