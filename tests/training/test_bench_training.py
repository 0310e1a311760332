"""The benchmark of training: what it compares computes the same, and it writes what it measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LENGTH = 512


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # other tests' threads
    import training

    # A GPU would compute in bfloat16, where these bounds say nothing.
    monkeypatch.setattr(training, "DEVICE", "cpu")
    monkeypatch.setattr(training, "DTYPE", torch.float32)
    monkeypatch.setattr(training, "TOKENS_OF_A_BATCH", 1)
    return training


def text_and_plan(training):
    texts = training.in_vocabulary(training.texts_of(training.book(), LENGTH), 4096)
    return torch.from_numpy(texts), training.plan_of(texts, 64)


def share_of_pairs(training, length, window):
    """Counted pair by pair."""
    ids = training.book()[:length]
    is_kept = [place < 4 or ids[place] in training.SEPARATORS for place in range(length)]
    seen = [is_kept[k] or q - k < window for q in range(length) for k in range(q + 1)]
    return sum(seen) / len(seen)


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
    ways = training.step_ways(training.llama_5m(), 64, text, plan, False)
    losses = {way: run() for way, run in ways.items()}
    assert not close(losses[training.PACKED], losses[training.DENSE])
    gradients = {
        way: run.args[0].model.layers[0].self_attn.k_proj.weight.grad for way, run in ways.items()
    }
    assert close(gradients[training.PACKED], gradients[training.MASKED])
    assert not close(gradients[training.PACKED], gradients[training.DENSE])


def test_it_writes_what_it_measured(training, monkeypatch, tmp_path, capsys):
    file = tmp_path / "training.json"
    options = ["--lengths", "300", "--turns", "1", "--seconds", "0", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["training.py", *options])
    pythia = training.pythia  # with its own vocabulary it takes seconds to make
    monkeypatch.setattr(training, "pythia", lambda num_layers: pythia(num_layers, 4096))
    training.main()
    found = json.loads(file.read_text())
    assert found["cpu"]
    rows = found["attention"] + found["steps"]
    names = "attention", "Llama, 5M", "Pythia-160M, 2 layers"
    assert tuple(row.get("model", "attention") for row in rows) == names
    for row, window in zip(rows, (256, 64, 128), strict=True):
        assert (row["tokens"], row["window"]) == (300, window)
        assert row["seconds"].keys() == {training.DENSE, training.PACKED, training.MASKED}
        assert row["pairs"] == pytest.approx(share_of_pairs(training, 300, window), abs=1e-12)
    assert "times faster than" in capsys.readouterr().out


def test_flex_attention_is_refused_on_a_cpu(training, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--flex"])
    with pytest.raises(SystemExit):
        training.main()
    assert "no backward pass on a CPU" in capsys.readouterr().err
