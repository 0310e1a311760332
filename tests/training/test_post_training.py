"""``benchmarks/post_training.py``, small: it trains, stops, goes on, and asks the served model."""

import importlib
import json
import sys

import pytest
import torch
from helpers import ROOT
from small_models import make_ids, make_model
from transformers import AutoTokenizer

pytestmark = pytest.mark.training

SMALL = ["--train", "adapter", "--length", "96", "--every", "1", "--documents", "1"]
WAY = "SepLLM 64, by logits"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The module, with the demo model, short texts and a folder of its own."""
    for folder in ("benchmarks", "examples/training"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # other tests' threads
    found = importlib.import_module("post_training")
    monkeypatch.setattr(found, "MODEL", ROOT / "examples/models/pg19-5m-sep")
    monkeypatch.setattr(found, "TRAINED_ON", ["examples/data/860.txt"])
    monkeypatch.setattr(found, "HELD_OUT_LENGTH", 192)
    monkeypatch.setattr(found, "HELD_OUT_PIECES", 1)
    monkeypatch.setattr(found, "FOLDER", tmp_path / "work")
    yield found
    for name in ("common", "post_train", "post_training"):
        sys.modules.pop(name, None)


def test_ways_train_go_on_and_answer(benchmark, monkeypatch, tmp_path):
    """A curve goes on where it ended, and a merged adapter answers beside the untrained model."""
    asked = []

    def ask(options, documents, model):
        asked.append((options, len(documents), (model / "config.json").exists(), model))
        return {"rows": [{"kind": "number", "right": len(asked) > 1}]}

    monkeypatch.setattr(benchmark, "ask", ask)
    output = tmp_path / "found.json"

    def run(*more):
        arguments = [*SMALL, "--steps", "2", "--ways", WAY, "--output", str(output), *more]
        monkeypatch.setattr(sys, "argv", ["post_training.py", *arguments])
        benchmark.main()
        return json.loads(output.read_text())["ways"][WAY]

    found = run()
    assert [point["step"] for point in found["curve"]] == [0, 1, 2]
    assert 0 < found["share_attended"] < 1
    assert all(0 < share <= 1 for share in found["agreement"])
    assert found["right"] == [{"number": False}, {"number": True}]
    options = {"num_sink_tokens": 4, "window_size": 64}
    assert [each[:3] for each in asked] == [(options, 1, True)] * 2
    assert asked[0][3] == benchmark.MODEL != asked[1][3]
    assert output.with_suffix(".png").exists()
    assert run() == found, "what is finished is not done again"
    assert len(asked) == 2
    other = run("--learning-rate", "1e-4")["curve"]
    assert other[0] == found["curve"][0]
    assert other[2] != found["curve"][2], "other settings begin anew"


def test_streaming_with_as_many_tokens_in_the_mean(benchmark, monkeypatch, tmp_path):
    """The window that is as wide at a text's end sees more before it."""
    name = f"{benchmark.EQUAL}SepLLM 64, by the text"
    output = tmp_path / "found.json"
    arguments = [*SMALL, "--steps", "1", "--ways", name, "--output", str(output)]
    arguments[arguments.index("--documents") + 1] = "0"
    monkeypatch.setattr(sys, "argv", ["post_training.py", *arguments])
    benchmark.main()
    found = json.loads(output.read_text())["ways"][name]
    window = found["equal_mean"]["window_size"]
    assert window < found["options"]["window_size"]
    assert found["mean_attended"] > window
    perplexities = found["equal_mean"]["perplexity"]
    ends = [found["curve"][0]["perplexity"], found["curve"][-1]["perplexity"]]
    assert not {*perplexities} & {*ends}
    model, tokenizer = benchmark.load(), AutoTokenizer.from_pretrained(benchmark.MODEL)
    held_out = benchmark.pieces(tokenizer, benchmark.HELD_OUT, 192, 1)
    benchmark.apply(model, {**found["options"], "window_size": window}, tokenizer)
    assert perplexities[0] == benchmark.perplexity(model, held_out)


@pytest.mark.parametrize("autocast", [False, True])
def test_teacher(benchmark, monkeypatch, autocast):
    """The model's own logits, to the bit; a text is computed once."""
    model = make_model().float()
    texts = torch.tensor(make_ids(48, 48))
    teacher = benchmark.Teacher(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = [model(input_ids=text[None], use_cache=False).logits for text in texts]
        first = [teacher(input_ids=text[None], use_cache=False).logits for text in texts]
        monkeypatch.setattr(model.model, "forward", None)
        both = teacher(input_ids=texts.flip(0), use_cache=False).logits
    assert all(torch.equal(x, y) for x, y in zip(first, wanted, strict=True))
    assert both.shape == (2, *wanted[0].shape[1:])
    assert torch.equal(both.argmax(-1), torch.cat(wanted).argmax(-1).flip(0))
