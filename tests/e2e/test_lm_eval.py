"""lm-eval runs the plugin, and says what the explicit mask says (``examples/lm_eval.sh``)."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import MODEL, ROOT

from vllm_sepllm.engine.in_process import clean_up
from vllm_sepllm.oracle.dense_mask import masked_logits, sepllm_mask

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

WINDOW, EVERYTHING = 64, 2048
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 2**27, "enforce_eager": True}
SCRIPT = ROOT / "examples/lm_eval.sh"
# Of sums of some hundred float32 logits, which two programs add up in different orders.
NATS = 1e-4
# In the place of Python: lm-eval is told apart from what else the script runs.
STUB = """#!{python}
import json, os, sys
if sys.argv[1:3] != ["-m", "lm_eval"]:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
print("COMMAND " + json.dumps(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """What the script would have lm-eval do, for some options."""
    stub = tmp_path_factory.mktemp("stub") / "python"
    stub.write_text(STUB.format(python=sys.executable), encoding="utf8")
    stub.chmod(0o755)

    def ask(*arguments, **more):
        found = subprocess.run(
            [SCRIPT, *arguments],
            env={**os.environ, "PYTHON": str(stub), "ENGINE": json.dumps(ENGINE), **more},
            capture_output=True,
            text=True,
            cwd=stub.parent,
        )
        lines = found.stdout.splitlines()
        said = [json.loads(x.removeprefix("COMMAND ")) for x in lines if x.startswith("COMMAND ")]
        return SimpleNamespace(code=found.returncode, said=said, error=found.stderr)

    return ask


def value_of(command, name):
    return command[command.index(name) + 1]


@pytest.fixture(scope="module")
def results(commands, inspected_here, no_engine):
    """Figures and answers by window; ``None`` is full attention. Two texts and two problems."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    no_engine()
    full, narrow = commands(MODEL, json.dumps({"window_size": WINDOW})).said
    wide = commands(MODEL, json.dumps({"window_size": EVERYTHING}), ONLY="sepllm").said[0]
    found = {}
    before = os.getcwd()
    os.chdir(ROOT)  # paths of the tasks are relative to it
    try:
        tasks = TaskManager(include_path=value_of(full, "--include_path"))
        for window, command in ((None, full), (WINDOW, narrow), (EVERYTHING, wide)):
            ran = simple_evaluate(
                model="vllm",
                model_args=json.loads(value_of(command, "--model_args")),
                tasks=value_of(command, "--tasks").split(","),
                task_manager=tasks,
                batch_size=value_of(command, "--batch_size"),
                limit=2,
                gen_kwargs={"max_gen_toks": 32},
                bootstrap_iters=0,
            )
            samples = {name: [one["resps"] for one in of] for name, of in ran["samples"].items()}
            found[window] = ran["results"], samples
            del ran
            clean_up()
    finally:
        os.chdir(before)
    return found


def test_a_window_over_everything_is_full_attention(results):
    """To the last digit."""
    full, everything = results[None], results[EVERYTHING]
    assert set(full[0]) == {"sepllm_book", "sepllm_gsm8k"}
    assert everything == full
    # Two filters of one task.
    assert {name: len(of) for name, of in full[1].items()} == {"sepllm_book": 2, "sepllm_gsm8k": 4}
    assert results[WINDOW][0] != full[0]


@pytest.mark.parametrize("window", [None, WINDOW])
def test_bits_per_byte_are_those_of_the_mask(
    results, window, reference_model, separator_ids, tokenizer
):
    with (ROOT / "examples/lm_eval/book.jsonl").open(encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(2), strict=False)]
    nats, count = 0.0, 0
    for text in texts:
        # lm-eval puts the first token of a text before it, though the tokenizer has done so.
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        assert len(ids) < 2000, "more than one piece for lm-eval"
        mask = sepllm_mask(ids, separator_ids, 4, window or len(ids))
        logits = masked_logits(reference_model, ids, mask)[:-1]
        target = torch.tensor(ids[1:])
        nats += float(torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum"))
        count += len(ids) - 1
    size = sum(len(text.encode()) for text in texts)
    found = results[window][0]["sepllm_book"]["bits_per_byte,none"] * size * math.log(2)
    assert found / count == pytest.approx(nats / count, abs=NATS)


def test_the_script(commands, tmp_path):
    """Full attention and SepLLM take turns with the same tasks; what follows goes to lm-eval."""
    full, ours = commands(MODEL, '{"preset": "facts"}', "--limit", "5", TASKS="a,b").said
    arguments = json.loads(value_of(full, "--model_args"))
    assert arguments == {"pretrained": MODEL, **ENGINE}
    more = {"attention_backend": "sepllm", "additional_config": {"sepllm": {"preset": "facts"}}}
    assert json.loads(value_of(ours, "--model_args")) == {**arguments, **more}
    for command in (full, ours):
        assert value_of(command, "--tasks") == "a,b"
        assert command[-2:] == ["--limit", "5"]
    assert value_of(full, "--output_path") != value_of(ours, "--output_path")
    plain = commands(MODEL, ONLY="sepllm").said
    assert len(plain) == 1
    assert json.loads(value_of(plain[0], "--model_args"))["additional_config"] == {"sepllm": {}}
    here = commands(MODEL, OUTPUT="results").said
    assert value_of(here[0], "--output_path").endswith("/results/full")
    refused = (([], "", "name a model"), ([MODEL, "{window"], "", "no JSON"))
    for arguments, only, part in (*refused, ([MODEL], "both", "must be full or sepllm")):
        found = commands(*arguments, ONLY=only)
        assert found.code != 0
        assert part in found.error
        assert not found.said
