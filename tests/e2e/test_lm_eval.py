"""lm-eval runs the plugin, and says what the explicit mask says (``examples/lm_eval.sh``)."""

import json
import math
import os
import subprocess

import pytest
import torch
from helpers import MODEL, ROOT

from vllm_sepllm.oracle.dense_mask import masked_logits, sepllm_mask

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

WINDOW, EVERYTHING = 64, 2048
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 2**27, "enforce_eager": True}
# Of sums of some hundred float32 logits, which two programs add up in different orders.
NATS = 1e-4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results and answers by options, and the texts of ``sepllm_book``: two of each task."""
    folder = tmp_path_factory.mktemp("lm-eval")
    found = {}
    for window in (WINDOW, EVERYTHING):
        options = {"window_size": window}
        environment = {
            **os.environ,
            "ENGINE": json.dumps(ENGINE),
            "OUTPUT": str(folder / str(window)),
            "ONLY": "" if window == WINDOW else "sepllm",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [ROOT / "examples/lm_eval.sh", MODEL, json.dumps(options)]
        more = ["--limit", "2", "--log_samples", "--gen_kwargs", '{"max_gen_toks": 32}']
        run = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, cwd=folder
        )
        assert run.returncode == 0, run.stderr[-3000:]
        for path in (folder / str(window)).iterdir():
            found[window if path.name == "sepllm" else None] = read(path)
    return found


def read(folder):
    """Figures by task, and what was answered."""
    [file] = folder.rglob("results_*.json")
    figures = json.loads(file.read_text(encoding="utf8"))["results"]
    samples = {
        task: [
            json.loads(line)["resps"]
            for line in next(folder.rglob(f"samples_{task}_*.jsonl")).open(encoding="utf8")
        ]
        for task in figures
    }
    return figures, samples


def test_a_window_over_everything_is_full_attention(results):
    full, everything = results[None], results[EVERYTHING]
    assert set(full[0]) == {"sepllm_book", "sepllm_gsm8k"}
    assert everything == full
    assert {task: len(x) for task, x in full[1].items()} == {
        "sepllm_book": 2,
        "sepllm_gsm8k": 4,  # two filters
    }
    assert results[WINDOW] != full


@pytest.mark.parametrize("window", [None, WINDOW])
def test_bits_per_byte_are_those_of_the_mask(
    results, window, reference_model, separator_ids, tokenizer
):
    with (ROOT / "examples/lm_eval/book.jsonl").open(encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(2), strict=False)]
    nats, count = 0.0, 0
    for text in texts:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
        ids = [start, *tokenizer.encode(text, add_special_tokens=False)]
        assert len(ids) < 2000, "more than one piece for lm-eval"
        mask = sepllm_mask(ids, separator_ids, 4, window or len(ids))
        logits = masked_logits(reference_model, ids, mask)[:-1]
        target = torch.tensor(ids[1:])
        nats += float(torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum"))
        count += len(ids) - 1
    size = sum(len(text.encode()) for text in texts)
    found = results[window][0]["sepllm_book"]["bits_per_byte,none"] * size * math.log(2)
    assert found / count == pytest.approx(nats / count, abs=NATS)
