"""The recipes of ``examples/training``, small: they train, stop, go on, and leave a model."""

import gzip
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.oracle.dense_mask import masked_logits, sepllm_mask
from vllm_sepllm.separators import resolve_separators

pytestmark = pytest.mark.training

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/training"
SMALL = ["data.length=192", "data.held_out_pieces=1", "training.save_steps=1"]
TEXTS = "texts", "held_out"
SMALL += ["training.per_device_train_batch_size=1", "training.warmup_steps=1"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of text to train on, and one that is held out."""
    book = (ROOT / "examples/data/860.txt").read_text(encoding="utf8")
    folder = tmp_path_factory.mktemp("texts")
    (folder / "trained.txt").write_text(book[:40_000], encoding="utf8")
    with gzip.open(folder / "held_out.txt.gz", "wt", encoding="utf8") as file:
        file.write(book[40_000:50_000])
    return folder / "trained.txt", folder / "held_out.txt.gz"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, texts):
    """Run a recipe's main; what it printed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    own = [f'data.{name}=["{path}"]' for name, path in zip(TEXTS, texts, strict=True)]

    def run(name, *changes):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        output = f'training.output_dir="{tmp_path}"'
        arguments = [part for each in (*SMALL, *own, output, *changes) for part in ("--set", each)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        module.main()
        return capsys.readouterr().out

    yield run
    for name in ("common", "pretrain", "post_train", "extend_context", "adapt_pod"):
        sys.modules.pop(name, None)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_pretrain(run, tmp_path):
    """Both models see the same; the one under the rule carries it, and costs fewer operations.
    Started again, neither is trained any further."""
    changes = ["sepllm.window_size=16", "training.max_steps=2", "training.logging_steps=1"]
    said = run("pretrain", *changes)
    found = summary(tmp_path)
    run("pretrain", *changes)
    assert summary(tmp_path) == found
    assert "--attention-backend sepllm" in said
    assert found["dense"]["tokens"] == found["sepllm"]["tokens"] == 2 * 192
    assert found["sepllm"]["operations"] < found["dense"]["operations"]
    for way in found.values():
        assert 1 < way["perplexity of held-out text"] < 4096, "no better than any token for any"
    config = json.loads((tmp_path / "sepllm/model/config.json").read_text())
    assert config["sepllm"] == {"num_sink_tokens": 4, "window_size": 16}
    assert "sepllm" not in json.loads((tmp_path / "dense/model/config.json").read_text())


def test_curves_of_pretraining(run, tmp_path, monkeypatch):
    """By tokens and operations of all that was trained, in seconds of all sessions."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    changes = ["training.logging_steps=1", 'model.attention=["sepllm"]']
    for steps in (1, 3):
        run("pretrain", *changes, f"training.max_steps={steps}")
    found = summary(tmp_path)["sepllm"]
    points = importlib.import_module("pretraining").curve(found)
    assert [point["tokens"] for point in points] == [192, 384, 576]
    assert points[-1]["operations"] == found["operations"]
    assert 0 < points[0]["seconds"] < points[1]["seconds"] < points[2]["seconds"]


def test_operations_of_dense_layers(run, tmp_path):
    """What a layer saves is counted as often as there are such layers."""
    operations = {}
    for dense in ([], [0, 1], [0, 1, 2, 3, 4]):
        shutil.rmtree(tmp_path)
        changes = [f"sepllm.dense_layers={dense}", "training.max_steps=1", "sepllm.window_size=16"]
        run("pretrain", *changes)
        found = summary(tmp_path)
        operations[len(dense)] = found["dense"]["operations"] - found["sepllm"]["operations"]
    for dense, saved in operations.items():  # pairs are rounded to a whole number
        assert saved == pytest.approx(operations[0] * (6 - dense) / 6, rel=1e-3)


DEMO = ['model.path="examples/models/pg19-5m-sep"', "training.gradient_accumulation_steps=1"]


def test_post_train_goes_on_where_it_stopped(run, tmp_path, texts):
    changes = [*DEMO, 'method.loss="distillation"', "training.logging_steps=1"]
    run("post_train", *changes, "training.max_steps=2")
    first = summary(tmp_path)["log"]
    broken = tmp_path / "checkpoint-9"  # as if it had been stopped while it saved
    shutil.copytree(tmp_path / "checkpoint-2", broken)
    (broken / "trainer_state.json").write_text('{"global_step": 9, "log_hi')
    said = run("post_train", *changes, "training.max_steps=3")
    assert f"{broken} was not saved to its end: it is removed" in said
    log = summary(tmp_path)["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert log[:2] == first[:2], "steps were trained again"
    seconds = [entry["seconds"] for entry in log]
    assert 0 < seconds[0] < seconds[1] < seconds[2] <= seconds[3], "of both sessions"
    assert f"vllm serve {tmp_path / 'model'} --attention-backend sepllm" in said
    wanted = perplexity_under_the_mask(tmp_path / "model", texts[1], 192)
    assert summary(tmp_path)["after"] == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def perplexity_under_the_mask(folder, file, length):
    """Of the second half of a text's first piece: a saved model under the explicit mask of its
    rule's sinks and window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    separators = resolve_separators(SepLLMConfig(), tokenizer).token_ids
    rule, text = model.config.sepllm, gzip.decompress(file.read_bytes()).decode()
    ids = tokenizer(text)["input_ids"][:length]  # begins with a token of its own
    mask = sepllm_mask(ids, separators, rule["num_sink_tokens"], rule["window_size"])
    logits = masked_logits(model, ids, mask)[length // 2 - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[length // 2 :])).exp())


def test_post_train_an_adapter(run, tmp_path):
    options = 'method.train="adapter"', 'method.loss="cross-entropy"', "training.logging_steps=1"
    options += ("adapter.r=4",)
    run("post_train", *DEMO, *options, "training.max_steps=1")
    first = summary(tmp_path)["log"]
    said = run("post_train", *DEMO, *options, "training.max_steps=2")
    log = summary(tmp_path)["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert log[:1] == first[:1], "the step was trained again"
    rule = json.loads((tmp_path / "model/sepllm.json").read_text())
    assert rule == {"num_sink_tokens": 4, "window_size": 64}
    assert f"--max-lora-rank 8 --lora-modules trained={tmp_path / 'model'}" in said


def test_extend_context_goes_on_where_it_stopped(run, tmp_path):
    """Embeddings and norms too, which are trained beside the adapter."""
    changes = ['method.attention="SepLLM"', "training.logging_steps=1"]
    run("extend_context", *changes, "training.max_steps=3")
    torch.manual_seed(7)  # what an adapter begins with is a matter of the recipe's seed
    once = summary(tmp_path / "SepLLM")
    shutil.rmtree(tmp_path / "SepLLM")
    run("extend_context", *changes, "training.max_steps=2")
    (tmp_path / "SepLLM/checkpoint-3").mkdir()  # as if it had been stopped while it saved
    run("extend_context", *changes, "training.max_steps=3")
    again = summary(tmp_path / "SepLLM")
    name = "perplexity of held-out text"
    assert again[name] == pytest.approx(once[name], rel=1e-5)
    run("extend_context", *changes, "training.max_steps=3")
    assert summary(tmp_path / "SepLLM") == again, "trained further than it was to be"


@pytest.mark.parametrize("attention", ["SF-Attn", "S2-Attn", "interpolation"])
def test_extend_context(run, tmp_path, attention):
    from transformers import AutoModelForCausalLM

    change = f'method.attention="{attention}"'
    said = run("extend_context", change, "training.max_steps=1")
    folder = tmp_path / attention / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 10000.0,
    }
    assert config["max_position_embeddings"] == 192, "no longer than it was trained for"
    assert "sepllm" not in config
    assert "attention-backend" not in said
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_length_of_no_whole_groups(run):
    with pytest.raises(SystemExit, match=r"data\.length=196 is not 4 groups .* data\.length=200$"):
        run("extend_context", "data.length=196")


def test_checkpoints_of_another_transformers(run, tmp_path):
    """They are whole, and not removed; nor is one that cannot be read."""
    run("post_train", *DEMO, "training.max_steps=1")
    path = tmp_path / "checkpoint-1/trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 1}))
    with pytest.raises(TypeError, match="of_tomorrow"):
        run("post_train", *DEMO, "training.max_steps=2")
    assert path.exists()


def test_another_run_does_not_go_on_from_its_checkpoints(run, tmp_path):
    run("post_train", *DEMO, "training.max_steps=1")
    with pytest.raises(SystemExit, match="a run with other settings"):
        run("post_train", *DEMO, "training.max_steps=2", "sepllm.window_size=32")


def test_a_refused_run_leaves_its_folder_to_the_next(run, tmp_path):
    with pytest.raises(SystemExit, match=r"lower data\.length"):
        run("post_train", *DEMO, "data.length=1000000", "training.max_steps=1")
    (tmp_path / "recipe.json").write_text("{}")  # of a run that ended before its first checkpoint
    run("post_train", *DEMO, "training.max_steps=1")
    assert json.loads((tmp_path / "recipe.json").read_text())["data"]["length"] == 192


def test_texts_and_models_of_others(run, tmp_path):
    """One text, by its path, and a model that is not trained under the rule."""
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night, and so on. " * 40, encoding="utf8")
    given = f"data.texts={text}", "model.attention=dense", "training.max_steps=1"
    said = run("pretrain", *given, "training.per_device_train_batch_size=50")
    assert said.rstrip().endswith(f"vllm serve {tmp_path / 'dense/model'}")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/models/pg19-5m-sep")
    whole = len(tokenizer(text.read_text(encoding="utf8"))["input_ids"]) // 192 * 192
    assert summary(tmp_path)["dense"]["tokens"] == whole < 50 * 192, "the batch was not full"
    with pytest.raises(SystemExit, match=r"nowhere/it\.txt is no file: texts are named from"):
        run("pretrain", "data.texts=nowhere/it.txt")
    with pytest.raises(SystemExit, match=r"model\.path='models/of/mine': .* is no folder"):
        run("post_train", "model.path=models/of/mine")


def test_a_piece_begins_as_a_prompt_does(monkeypatch, tmp_path):
    """With the first token that a tokenizer puts before every text, if it has one."""
    from tokenizers.processors import TemplateProcessing

    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/models/pg19-5m-sep")
    text = tmp_path / "text.txt"
    text.write_text("One, two. " * 50, encoding="utf8")
    begins = common.pieces(tokenizer, str(text), 16)
    assert begins[0]["input_ids"] == tokenizer(text.read_text())["input_ids"][:16]
    assert {row["input_ids"][0] for row in begins} == {tokenizer.bos_token_id}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    found = common.pieces(tokenizer, str(text), 16)
    ids = [token for row in found for token in row["input_ids"]]
    assert len(ids) > 100
    assert tokenizer.bos_token_id not in ids
    of_begins = [token for row in begins for token in row["input_ids"][1:]]
    least = min(len(ids), len(of_begins))
    assert of_begins[:least] == ids[:least], "a token of the text was lost"


@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("true", True), ("None", None), ("3e-4", 3e-4), ("a b", "a b")],
)
def test_values(monkeypatch, text, value):
    monkeypatch.syspath_prepend(str(FOLDER))
    assert importlib.import_module("common").value_of(text) == value


@pytest.mark.parametrize(
    "change", ["data.lenght=7", "model.size.hidden_size=3", "nothing", "data="]
)
def test_settings_that_are_not_there(run, change, capsys):
    with pytest.raises(SystemExit):
        run("pretrain", change)
    assert f"--set {change}: pretrain.toml has no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "change", "known"),
    [
        ("extend_context", 'method.attention="SFAttn"', "interpolation, full, SepLLM"),
        ("post_train", "method.loss=logits", "cross-entropy, distillation"),
        ("post_train", "method.train=lora", "all weights, adapter"),
        ("pretrain", 'model.attention=["SepLLM"]', "dense, sepllm"),
        ("pretrain", "model.attention=SepLLM", "dense, sepllm"),
    ],
)
def test_a_wrong_name_is_said(run, recipe, change, known):
    with pytest.raises(SystemExit, match=f"must be one of {known}"):
        run(recipe, change)


def test_adapt_pod(run, tmp_path):
    """By blocks of layers that attend alike. What training wins back shows in more steps."""
    method = ["method.layers_of_a_block=0", "method.least_similarity=0.3", "method.recent=16"]
    said = run("adapt_pod", *method, "training.max_steps=2")
    found = summary(tmp_path)
    assert [at for at, *_ in found["blocks"]] != list(range(6)), "nothing was shared"
    own, shared = found["ways"]["own keys"], found["ways"]["PoD"]
    assert own["saved"] == 0 < shared["saved"]
    assert own["before"] < shared["before"]
    assert own["tokens"] == shared["tokens"] == 2 * 192
    assert shared["after"] != shared["before"]
    assert "of a distant token's KV cache would be saved" in said
