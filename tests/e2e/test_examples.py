"""The examples run as their first lines say, and what `make demo` prints last can be pasted.

The endless chat: test_serve.py. The pool of actors: test_ray.py.
"""

import json
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT, SMOLLM2
from serving import environment

pytestmark = pytest.mark.e2e

QUESTION = "What is the capital of France?"


def run(script, *arguments):
    """What an example prints."""
    result = subprocess.run(
        [sys.executable, f"examples/{script}", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def demo():
    """``examples/demo_answers.py`` as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    import demo_answers

    sys.path.remove(str(ROOT / "examples"))
    return demo_answers


def test_the_first_part_of_the_demo(capsys, monkeypatch, no_engine):
    """With fewer and shorter requests. What it prints is what the engines hold."""
    from vllm_sepllm.engine.in_process import clean_up

    no_engine()
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    demo = runpy.run_path(str(ROOT / "examples/demo.py"))
    demo["run"].__globals__.update(NUM_REQUESTS=2, NEW_TOKENS=40)
    results = {}
    for name in ("dense", "sepllm"):
        results[name] = demo["run"](name)
        clean_up()
        results[name]["share_visible"] = demo["share_visible"](name, results[name]["outputs"])
    dense, ours = results["dense"], results["sepllm"]
    assert [len(output) for output in ours["outputs"]] == [40, 40]
    assert dense["blocks_at_end"] == -(-1739 // 32)  # the last token is not computed
    # What is visible, and up to two pages more: the window's first and the stream's last.
    least = ours["share_visible"] * 1739 / 32
    assert least <= ours["blocks_at_end"] <= least + 4
    assert 0.1 < ours["share_visible"] < 0.3
    demo["show"](results)
    shown = capsys.readouterr().out
    assert f"{ours['blocks_at_end'] / dense['blocks_at_end']:.0%}" in shown
    assert "SepLLM continues the book" in shown


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    """A random one for SmolLM2, in the format of the PEFT library."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((SMOLLM2 / "config.json").read_text())
    size, rank = config["hidden_size"], 4
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, size, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(size, rank, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    about |= {"base_model_name_or_path": str(SMOLLM2), "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def server(servers, demo, adapter):
    """The line that `make demo` prints, with an adapter. In float32, so that an answer does not
    depend on what is computed beside it, or is in the cache."""
    options = (
        "--dtype",
        "float32",
        "--enforce-eager",
        "--enable-lora",
        "--max-loras",
        "2",
        "--max-lora-rank",
        "8",
    )
    adapters = ("--lora-modules", f"mine={adapter}")
    return servers(*options, *adapters, command=demo.serve_command())


def answer(server, model):
    messages = [{"role": "user", "content": QUESTION}]
    given = {"model": model, "messages": messages, "max_tokens": 30}
    return server.post("chat/completions", **given)["choices"][0]["message"]["content"].strip()


def test_smollm2_demo_lines(server, demo):
    line = demo.curl_command().replace(":8000/", f":{server.port}/")
    assert str(server.port) in line
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [choice] = json.loads(done.stdout)["choices"]
    assert "Paris" in choice["message"]["content"]
    log = server.log.read_text()
    assert "SepLLM attention: policy=sepllm" in log


def test_smollm2_chat_client(server, demo):
    """What is streamed is what comes without streaming, from the model and from the adapter."""
    given = (QUESTION, "--base-url", f"{server.url}/v1", "--max-tokens", "30")
    plain = run("chat_client.py", *given).strip()
    assert plain == answer(server, demo.MODEL)
    adapted = run("chat_client.py", *given, "--model", "mine").strip()
    assert adapted == answer(server, "mine")
    assert plain != adapted


def test_smollm2_json_client(server):
    text = "Clara is 31 years old. She lives in Rome with two cats."
    shown = json.loads(run("json_client.py", text, "--base-url", f"{server.url}/v1"))
    assert shown.keys() == {"name", "age", "city"}
    assert (shown["name"], shown["age"]) == ("Clara", 31)


@pytest.fixture
def run_here(monkeypatch, capfd):
    """What an example prints that needs no process of its own, which would import vLLM again."""

    def run(script):
        runpy.run_path(f"examples/{script}", run_name="__main__")
        return capfd.readouterr().out

    monkeypatch.chdir(ROOT)
    return run


def test_smollm2_offline(smollm2, inspected_here, no_engine, run_here):
    from vllm.distributed import cleanup_dist_env_and_memory

    no_engine()
    try:
        assert "Paris" in run_here("offline.py")
    finally:
        cleanup_dist_env_and_memory()


def test_show_kept_tokens(run_here):
    shown = run_here("show_kept_tokens.py")
    last = shown.strip().splitlines()[-1]
    kept, _, total = last.split()[:3]
    assert last.endswith("%)")
    assert 0.1 < int(kept) / int(total) < 0.5
