"""``vllm-sepllm eval`` on the demo model: scores equal the explicit mask, runs go on and repeat."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import MODEL, tokenizer
from typer.testing import CliRunner

from vllm_sepllm.cli import main
from vllm_sepllm.evaluation import child
from vllm_sepllm.evaluation import material as materials
from vllm_sepllm.evaluation.material import NEW_TOKENS, Suite, make_material, package_text
from vllm_sepllm.evaluation.measure import answer_questions, score_texts
from vllm_sepllm.oracle.dense_mask import masked_logits, sepllm_mask

pytestmark = pytest.mark.e2e

SMALL = Suite(2, 400, (500,), 1, 1)
# Of sums of some hundred float32 logits; vLLM and Transformers differ by less.
NATS = 1e-4


@pytest.fixture(scope="module")
def material():
    return make_material(tokenizer(), [package_text()], SMALL)


@pytest.fixture
def engine(engines):
    return engines(sepllm={"window_size": 64}, enable_prefix_caching=True, block_size=32)


def test_scores_equal_the_explicit_mask(engine, material, reference_model, separator_ids):
    found = score_texts(engine.llm, material.texts, lambda: None)
    for text, nats, likeliest in zip(
        material.texts, found["nats"], found["likeliest"], strict=True
    ):
        half = len(text) // 2
        mask = sepllm_mask(text, separator_ids, 4, 64)
        logits = masked_logits(reference_model, list(text), mask)[half - 1 : -1]
        expected = torch.nn.functional.cross_entropy(
            logits, torch.tensor(text[half:]), reduction="none"
        )
        assert nats == pytest.approx(expected.tolist(), abs=NATS)
        assert likeliest == logits.argmax(-1).tolist()


def test_answers_do_not_depend_on_what_runs_beside_them(engine, material):
    """Questions about a document run together, and find it in the prefix cache."""
    found = answer_questions(engine.llm, material.questions, lambda: None)
    assert engine.llm.reset_prefix_cache()
    for question, reply in zip(material.questions[::5], found["replies"][::5], strict=True):
        [alone] = engine.generate([list(question.token_ids)], max_tokens=NEW_TOKENS)
        ids = list(alone.outputs[0].token_ids)
        end = tokenizer().eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        assert reply == tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("window", [None, 64])
def test_bytes_held(engines, material, window):
    """Counted by hand: two pages of 32 tokens more than the window, and those of the stream."""
    sepllm = None if window is None else {"policy": "streaming", "window_size": window}
    engine = engines(sepllm=sepllm, enable_prefix_caching=True, block_size=32)
    held = score_texts(engine.llm, material.texts[:1], lambda: None)["held"]
    page = 32 * 2 * 6 * 4 * 32 * 4  # tokens, keys and values, layers, heads of 32, float32
    if window is None:  # 400 tokens and the first new one take 13 pages
        assert held == {"requests": 1, "mean": 13 * page, "peak": 13 * page}
    else:
        # One of sinks. Positions 338 to 401 stand in three pages of the window.
        assert held["mean"] == 4 * page
        assert held["peak"] > held["mean"]


def evaluate(folder, *more):
    command = ["eval", "--model", MODEL, "--window", "64", "--only", "facts", *more]
    return CliRunner().invoke(main.app, [*command, "--output", str(folder)])


def test_a_run_is_resumed_and_repeated(monkeypatch, tmp_path):
    """One way fails, the next run measures it alone; another run gives the same report."""
    monkeypatch.setitem(materials.SUITES, "quick", SMALL)
    began, start = [], child.subprocess.Popen

    def first_fails(command, **options):
        began.append(command[-1])
        if len(began) == 2:  # as if the machine had no memory left
            command = ["sh", "-c", "echo 'reason: 3 GiB are missing.' >&2; exit 1"]
        return start(command, **options)

    patched = SimpleNamespace(**{**vars(child.subprocess), "Popen": first_fails})
    monkeypatch.setattr(child, "subprocess", patched)
    found = evaluate(tmp_path / "one")
    assert found.exit_code == 1
    assert "'facts' failed: 3 GiB are missing; all it said is in" in found.stderr
    assert len(began) == 3, "the ways behind it were not measured"
    found = evaluate(tmp_path / "one")
    assert found.exit_code == 0, found.output
    assert [name.rsplit("/", 1)[1] for name in began[3:]] == ["facts.job"]
    evaluate(tmp_path / "one")
    assert len(began) == 4, "something was measured twice"

    report = (tmp_path / "one/report.json").read_bytes()
    ways = json.loads(report)["ways"]
    assert list(ways) == ["full attention", "facts", "StreamingLLM, KV of facts"]
    assert ways["full attention"]["agreement"] == 1
    # Short texts in big parts: what is held is more than what the last token sees.
    assert ways["facts"]["held"]["questions"]["mean"] >= ways["facts"]["ideal"]["questions"]
    assert "![quality" in (tmp_path / "one/report.md").read_text(encoding="utf8")
    assert (tmp_path / "one/report.png").stat().st_size > 10_000
    assert not list((tmp_path / "one/ways").glob("*.log"))

    # The preset again, from nothing.
    again = tmp_path / "two/ways"
    again.mkdir(parents=True)
    for name in ("full-attention", "streamingllm-kv-of-facts"):
        shutil.copy(tmp_path / f"one/ways/{name}.json", again)
    assert evaluate(tmp_path / "two").exit_code == 0
    assert [name.rsplit("/", 1)[1] for name in began[4:]] == ["facts.job"]
    assert (tmp_path / "two/report.json").read_bytes() == report
    measured = (tmp_path / "one/ways/facts.json").read_bytes()
    assert (again / "facts.json").read_bytes() == measured
