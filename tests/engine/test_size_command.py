"""``vllm-sepllm size``: what it shows, and what it says of what it cannot use.

That its numbers are those of an engine is compared where engines run (``Engine.check_size``).
"""

import json
import shutil
from pathlib import Path

import pytest
from helpers import MODEL, ROOT
from typer.testing import CliRunner

from vllm_sepllm.cli.common import InputError
from vllm_sepllm.cli.main import app
from vllm_sepllm.cli.sizing import parse_memory
from vllm_sepllm.engine.sizing import sizes

pytestmark = pytest.mark.engine

BOOK = str(ROOT / "examples/data/860.txt")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("24GiB", 24 << 30),
        ("24 gib", 24 << 30),
        ("24G", 24 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("1073741824", 1 << 30),
        ("2Ti", 2 << 40),
    ],
)
def test_memory(given, expected):
    assert parse_memory(given) == expected


@pytest.mark.parametrize("given", ["", "much", "-1GiB", "0", "24XB", "GiB", "1e400", "24 GiB GiB"])
def test_no_memory(given):
    with pytest.raises(InputError, match="must be a size such as 24GiB"):
        parse_memory(given)


def run(*arguments):
    result = CliRunner().invoke(app, ["size", *map(str, arguments)], env={"COLUMNS": "100"})
    return result.exit_code, result.output


def test_the_table():
    arguments = ("--model", MODEL, "--memory", "64MiB", "--context", 2048)
    code, shown = run(*arguments, "--text", BOOK, "-o", "window_size=64", "--dtype", "float32")
    assert code == 0, shown
    options = {"window_size": 64, "planning_text": BOOK}
    found = sizes({"model": MODEL, "max_model_len": 2048, "dtype": "float32"}, options, 64 << 20)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    each = (found.sepllm, found.full, found.full_fp8)
    assert table["pages of the KV cache"] == [f"{c.num_pages:,}" for c in each]
    assert table["at once, as vLLM logs it"] == [f"{c.concurrency:,.2f}" for c in each]
    decoding = [(c.num_pages - 1) / c.pages_decoding for c in each]
    assert table["requests decoding at once"] == [f"{number:,.2f}" for number in decoding]
    ratios = [f"{number / decoding[1]:.2f}x" for number in decoding]
    assert table["beside full attention"] == ratios
    assert ratios[1] == "1.00x"
    assert decoding[0] > 2 * decoding[1]
    assert f"{found.plan.share:.1%} kept (planning_text)" in shown
    assert found.plan.share == pytest.approx(0.137, abs=0.001)


def test_the_text_is_read_as_start_up_reads_it(tmp_path):
    """Its first MiB, from a file."""
    (tmp_path / "long").write_text("One, two. " * 900_000)
    arguments = ("--model", MODEL, "--memory", "64MiB", "--context", 2048, "--text")
    assert run(*arguments, tmp_path / "long")[0] == 0
    code, shown = run(*arguments, "-")
    assert code == 2
    assert "--text -: start-up reads it again, so give a file" in shown


def test_full_attention_has_a_page_of_tokens_for_each_page():
    found = sizes({"model": MODEL, "max_model_len": 2048, "dtype": "float32"}, {}, 64 << 20)
    layers, heads, size = 6, json_of(MODEL)["num_key_value_heads"], json_of(MODEL)["head_dim"]
    per_token = 2 * layers * heads * size * 4
    assert found.full.num_pages == (64 << 20) // (per_token * found.full.page_size)
    assert found.full.bytes_decoding == 2048 * per_token
    assert found.full_fp8.num_pages == (64 << 20) // (per_token // 4 * found.full.page_size)
    assert found.full_fp8.bytes_decoding == 2048 * per_token / 4


def json_of(model):
    return json.loads((Path(model) / "config.json").read_text())


def test_what_full_attention_has_no_room_for():
    code, shown = run(
        "--model",
        MODEL,
        "--memory",
        "9MiB",
        "--engine",
        "max_num_batched_tokens=64",
        "--dtype",
        "float32",
    )
    assert code == 0, shown
    [line] = [line for line in shown.splitlines() if "pages of the KV cache" in line]
    assert line.count("no room for one") == 1, "a byte per element is enough"
    [line] = [line for line in shown.splitlines() if "beside full attention" in line]
    assert "x" not in line.replace("beside full attention", "")


def test_texts_longer_than_the_models_positions():
    options = {"position_mode": "cache", "max_separator_tokens": 64, "window_size": 64}
    found = sizes({"model": MODEL, "max_model_len": 100_000, "dtype": "float32"}, options, 64 << 20)
    assert found.length == 100_000
    assert found.sepllm.pages_decoding < 20
    assert found.full is None


def test_ranks_and_stages_share_layers_and_heads():
    """Two ranks have half the heads each, two stages half the layers: twice the blocks."""
    arguments = {"model": MODEL, "max_model_len": 2048, "dtype": "float32"}
    alone = sizes(arguments, {}, 64 << 20).full
    ranks = sizes({**arguments, "tensor_parallel_size": 2}, {}, 64 << 20).full
    stages = sizes({**arguments, "pipeline_parallel_size": 2}, {}, 64 << 20).full
    assert ranks.num_pages == stages.num_pages
    assert ranks.num_pages // 2 == alone.num_pages
    assert ranks.bytes_decoding == stages.bytes_decoding == alone.bytes_decoding


GOOD = ("--model", MODEL, "--memory", "64MiB")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--memory", "no"), "--memory 'no': must be a size such as 24GiB"),
        (("--memory", "1MiB"), "KV cache"),
        (("--context", "0"), "--context 0: must be at least 1"),
        (("--context", "-1"), "--context -1: must be at least 1"),
        (("--context", "100000"), "max_model_len"),
        (("-o", "window_size=0"), "window_size=0"),
        (("--text", "nowhere.txt"), "--text 'nowhere.txt' cannot be read"),
        (("--text", BOOK, "-o", f"planning_text={BOOK}"), "drop one of them"),
        (("--engine", "max_model_len=5"), "is --context here"),
        (("--engine", "kv_cache_memory_bytes=5"), "is --memory here"),
        (("--engine", "unheard_of=5"), "EngineArgs have no argument 'unheard_of': leave it out"),
        (("--model", "nowhere/at/all"), "'nowhere/at/all' is no folder: give a folder"),
        (("--model", BOOK), "is a file: give the folder"),
    ],
)
def test_refused_with_one_sentence(arguments, part):
    code, shown = run(*GOOD, *arguments)
    assert code == 2, shown
    [line] = [line for line in shown.splitlines() if line.startswith("vllm-sepllm: ")]
    assert part in line


def test_a_config_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    code, shown = run("--model", tmp_path, "--memory", "64MiB")
    assert code == 2
    assert "cannot be read (" in shown
    assert "see whether vllm serve starts with it" in shown


def test_a_model_with_layers_of_other_kinds(tmp_path):
    for file in Path(MODEL).glob("*.json"):
        shutil.copy(file, tmp_path)
    config = json_of(MODEL)
    config["architectures"], config["model_type"] = ["Qwen2ForCausalLM"], "qwen2"
    config |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, shown = run("--model", tmp_path, "--memory", "64MiB")
    assert code == 2
    assert "layers of other kinds (sliding_attention)" in shown
