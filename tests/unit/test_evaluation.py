"""The pure parts of ``vllm-sepllm eval``: material, ways, statistics, the report."""

import math
from dataclasses import replace

import pytest
from made_tokenizers import ListedWords
from typer.testing import CliRunner

from vllm_sepllm.cli import evaluate as cli
from vllm_sepllm.cli import main
from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.evaluation.facts import WORDINGS
from vllm_sepllm.evaluation.material import (
    CHAT,
    DEPTHS,
    DOCUMENT,
    SUITES,
    Suite,
    make_material,
    package_text,
)
from vllm_sepllm.evaluation.pages import front, markdown, ordered
from vllm_sepllm.evaluation.report import controls, figures
from vllm_sepllm.evaluation.share import mean_attended, num_attended
from vllm_sepllm.evaluation.statistics import BLOCK, Pairs, nats_difference
from vllm_sepllm.evaluation.ways import (
    EQUAL,
    FACTS,
    FULL,
    RANDOM,
    SEPLLM,
    YOURS,
    make_ways,
    usual_options,
)
from vllm_sepllm.kept_ids import resolve_kept

pytestmark = pytest.mark.unit

SMALL = Suite(2, 300, (300,), 2, 1)
LAYERS = 6


@pytest.fixture(scope="module")
def material(smollm2):
    return make_material(smollm2, [package_text()], SMALL)


@pytest.fixture(scope="module")
def ways(smollm2, material):
    return {w.name: w for w in make_ways(usual_options(64, True), material, smollm2, LAYERS)}


def test_material(smollm2, material):
    assert material == make_material(smollm2, [package_text()], SMALL)
    assert [len(text) for text in material.texts] == [300, 300]
    of_a_document = len(DEPTHS) * len(WORDINGS)
    assert [q.setting for q in material.questions] == (
        [DOCUMENT] * 2 * of_a_document + [CHAT] * of_a_document
    )
    assert len(material.documents) == 3
    for question in material.questions:
        shown = smollm2.decode(question.token_ids)
        assert question.answer in shown
        assert not shown.rstrip().endswith(question.answer), "the answer is given away"
    for question, other in zip(material.questions, material.without, strict=False):
        assert replace(question, token_ids=()) == replace(other, token_ids=())
        facts_left = smollm2.decode(other.token_ids).count(question.answer)
        assert facts_left < smollm2.decode(question.token_ids).count(question.answer)


def test_a_conversation_holds_the_text_in_turns(smollm2):
    material = make_material(smollm2, [package_text()], Suite(1, 50, (900,), 0, 1))
    shown = smollm2.decode(material.questions[0].token_ids)
    assert shown.count("<|im_start|>user") == 900 // 400 + 2
    assert shown.count("Please go on.") == 900 // 400 + 1


def test_a_model_without_a_chat_template(tokenizer):
    assert not tokenizer.chat_template
    material = make_material(tokenizer, [package_text()], Suite(1, 50, (300,), 1, 1))
    for question in material.questions:
        shown = tokenizer.decode(question.token_ids)
        assert "Question: " in shown
        assert "Answer:" in shown


def test_suites_fit_into_a_context():
    for suite in SUITES.values():
        assert suite.within(100_000) == suite
        small = suite.within(2048)
        assert small.longest <= 2048 + 200
        assert small.text_length <= 2048
    with pytest.raises(ValueError, match=r"context of 512 tokens is too short.* takes 1068"):
        SUITES["quick"].within(512)


def test_texts_that_are_too_short(smollm2):
    with pytest.raises(ValueError, match=r"which gives 0 pieces of 300: give at least 600 tokens"):
        make_material(smollm2, ["Call me Ishmael."], SMALL)


def test_ways_have_equals(ways):
    assert next(iter(ways)) == FULL
    for name, way in ways.items():
        if name == FULL or name.startswith(EQUAL):
            assert way.equal is None
        else:
            assert ways[way.equal].of_texts["policy"] == "streaming"
    assert [name for name, way in ways.items() if way.is_control] == [RANDOM]


def test_equal_means_equal_kv(ways, material, smollm2):
    """Counted at the end of every text, over all layers."""
    for way in ways.values():
        if way.equal is None:
            continue
        mine = way.ideal(material, smollm2, LAYERS)
        other = ways[way.equal].ideal(material, smollm2, LAYERS)
        for task, share in mine.items():
            # Windows within 2 % are one way, and they are whole tokens.
            assert other[task] == pytest.approx(share, rel=0.02, abs=1 / 250), way.name


def test_random_ids_are_as_many(ways, material, smollm2):
    """In all texts together; none is drawn that would be more."""
    kept = set(resolve_kept(SepLLMConfig(), smollm2).token_ids)
    drawn = set(ways[RANDOM].of_texts["keep"])
    ids = [token for text in (*material.texts, *material.documents) for token in text]
    wanted, found = (sum(token in some for token in ids) for some in (kept, drawn))
    assert 0 <= wanted - found <= 2


def test_mean_attended_counts_dense_layers(smollm2, material):
    texts = material.texts
    config = SepLLMConfig(window_size=64)
    kept = sum(num_attended(config, smollm2, text) for text in texts) / len(texts)
    assert mean_attended(config, smollm2, texts, LAYERS) == pytest.approx(kept)
    dense = SepLLMConfig(window_size=64, dense_layers=(0, -1))
    expected = kept * 4 / 6 + 300 * 2 / 6
    assert mean_attended(dense, smollm2, texts, LAYERS) == pytest.approx(expected)
    assert mean_attended(None, smollm2, texts, LAYERS) == 300


def test_difference_of_nats():
    """Two blocks, of means 1 and 3: their mean is 2, its standard error 1."""
    first = [[1.0] * BLOCK + [3.0] * BLOCK]
    found = nats_difference(first, [[0.0] * 2 * BLOCK])
    assert (found.mean, found.error) == (2.0, 1.0)
    assert not found.is_clear
    same = nats_difference(first, first)
    assert (same.mean, same.error) == (0.0, 0.0)
    assert not same.is_clear
    assert math.isinf(nats_difference([[1.0]], [[0.0]]).error)


@pytest.mark.parametrize(
    ("first", "second", "chance"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (6, 0, 2 / 64), (1, 6, 2 * 8 / 128), (3, 3, 1.0)],
)
def test_sign_test(first, second, chance):
    assert Pairs(first, second).chance == pytest.approx(chance)
    assert Pairs(first, second).is_clear == (chance < 0.05)


def test_pairs():
    assert Pairs.of([True, True, False, False], [True, False, True, False]) == Pairs(1, 1)


def test_front():
    points = [(1, 1), (2, 3), (3, 2), (2, 0), (4, 3), (5, 4)]
    assert front(points) == [(1, 1), (2, 3), (5, 4)]


def result(material, nats, right):
    """Of a way that predicts so well, and answers the first ``right`` questions."""
    replies = [f" {q.answer}." if n < right else " no" for n, q in enumerate(material.questions)]
    halves = [len(text) // 2 for text in material.texts]
    held = {"mean": 100.0, "peak": 200.0}
    texts = {"nats": [[nats] * half for half in halves], "likeliest": [[1] * h for h in halves]}
    return {"texts": {**texts, "held": held}, "questions": {"replies": replies, "held": held}}


@pytest.fixture
def found(ways, material, smollm2):
    """Figures of made-up results: random ids predict worse than separators."""
    full = {**result(material, 3.0, 18), "without": {"replies": [" no"] * len(material.without)}}
    results = {FULL: full, SEPLLM: result(material, 3.2, 0), RANDOM: result(material, 3.3, 0)}
    equal = ways[SEPLLM].equal
    results[equal] = result(material, 3.1, 9)
    ideal = {name: ways[name].ideal(material, smollm2, LAYERS) for name in results}
    return {
        name: figures(ways[name], of, full, material.questions, ideal[name])
        for name, of in results.items()
    }


def test_figures(found):
    assert found[FULL].perplexity == pytest.approx(math.exp(3))
    assert sum(found[FULL].right) == 18
    assert found[FULL].held["texts"] == {"mean": 1.0, "peak": 1.0}
    assert found[FULL].agreement == 1.0


def test_controls_that_move(found, material):
    checks = controls(found, material.questions, material.without)
    assert [(name, sees) for name, sees, _ in checks] == [
        ("facts taken out", True),
        ("random ids for separators", True),
    ]
    shown = markdown("title", "about", found, material.questions, material.without)
    assert "blind" not in shown
    losing = "**SepLLM** predicts text worse (24.53 beside 22.20) and answers fewer questions (0"
    assert losing in shown


def test_controls_that_do_not_move(found, material):
    """Then the report says that the measurement is blind."""
    full = found[FULL]
    guessing = [f" {q.answer}" for q in material.without]
    full.result["without"]["replies"] = guessing
    found[RANDOM] = replace(found[RANDOM], result=found[SEPLLM].result)
    checks = controls(found, material.questions, material.without)
    assert [sees for _, sees, _ in checks] == [False, False]
    shown = markdown("title", "about", found, material.questions, material.without)
    assert shown.count("The measurement is blind to this") == 2


def test_each_equal_stands_behind_its_way(found, ways):
    assert ordered(found) == [FULL, SEPLLM, ways[SEPLLM].equal, RANDOM]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--suite", "long"], "--suite 'long': must be one of quick, full"),
        (["--window", "0"], "--window 0: must be at least 1"),
        (["--only", "H2O"], f"--only 'H2O': must be one of {SEPLLM}, "),
        (["-o", "window_size=0"], "window_size=0: must be at least 1"),
        (["-o", "heavy_ratio=0.1"], "heavy_ratio"),
        (["--engine", "dtype"], "'dtype': must be KEY=VALUE"),
        (["--text", "/no/such/file"], "text file '/no/such/file' cannot be read"),
        (["--model", "/no/such/model"], "model '/no/such/model' is no folder"),
    ],
)
def test_refused(smollm2, monkeypatch, tmp_path, arguments, part):
    from helpers import SMOLLM2

    command = ["eval", "--model", str(SMOLLM2), "--output", str(tmp_path / "out"), *arguments]
    found = CliRunner().invoke(main.app, command)
    assert found.exit_code == 2, found.output
    assert part in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_measured(smollm2, tmp_path):
    """A user's options come first, and ``--only`` leaves out what was not asked for."""
    from helpers import SMOLLM2

    given = cli.Given(str(SMOLLM2), (), "quick", 128, "float32", tmp_path, (YOURS, FACTS))
    evaluation = cli.prepare(given.with_options({"num_sink_tokens": 8}, {"block_size": 16}))
    names = [way.name for way in evaluation.ways]
    assert names == [FULL, YOURS, FACTS, f"{EQUAL}{YOURS}", f"{EQUAL}{FACTS}"]
    assert evaluation.ways[1].of_texts == {"window_size": 128, "num_sink_tokens": 8}
    assert evaluation.arguments["block_size"] == 16


def test_what_a_tokenizer_lacks_is_left_out(capsys):
    """One without digits; asked for by the user, it is refused."""

    class Words(ListedWords):
        words = (".", ",", "the", "The", "Anna")

    words = Words()
    options = {name: {"keep": [name]} for name in ("separators", "digits", "capitalized")}
    assert list(cli._possible(options, words)) == ["separators", "capitalized"]
    assert "digits is left out: " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="digits"):
        cli._possible({YOURS: options["digits"]}, words)
