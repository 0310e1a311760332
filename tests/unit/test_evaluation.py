"""The pure parts of ``vllm-sepllm eval``: material, ways, statistics, the report."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import transformers
from made_tokenizers import ListedWords, write_tekken
from typer.testing import CliRunner

from vllm_sepllm.carried import with_rule
from vllm_sepllm.cli import evaluate as cli
from vllm_sepllm.cli import main
from vllm_sepllm.cli.common import InputError, written_to
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.child import child
from vllm_sepllm.evaluation.facts import SPREAD, WORDINGS, chat_ids
from vllm_sepllm.evaluation.material import (
    CHAT,
    DEPTHS,
    DOCUMENT,
    NEW_TOKENS,
    SUITES,
    Suite,
    longest_request,
    make_material,
    package_text,
)
from vllm_sepllm.evaluation.pages import front, markdown, ordered, plot, summary
from vllm_sepllm.evaluation.report import as_json, controls, figures, sentence
from vllm_sepllm.evaluation.share import mean_attended, num_attended
from vllm_sepllm.evaluation.statistics import BLOCK, Difference, Pairs, nats_difference
from vllm_sepllm.evaluation.ways import (
    EQUAL,
    FACTS,
    FULL,
    H2O,
    RANDOM,
    SEPLLM,
    YOURS,
    make_ways,
    possible,
    served,
    unserved_ways,
    usual_options,
)
from vllm_sepllm.evaluation.worker import join
from vllm_sepllm.kept_ids import resolve_kept
from vllm_sepllm.oracle.dense_mask import KeptAfter, sepllm_mask

pytestmark = pytest.mark.unit

SMALL = Suite(2, 300, (500, 800), 1, 1)
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
    groups = f"{DOCUMENT} 500", f"{DOCUMENT} 800", f"{CHAT} 800"
    assert [q.group for q in material.questions] == [
        g for g in groups for _ in range(of_a_document)
    ]
    assert list(material.groups) == [*groups]
    assert len(material.documents) == 3
    for group, [ids] in material.groups.items():  # with chat marks and a question
        length = int(group.split()[1])
        assert length - 100 < len(ids) < length + 200
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
        for length in range(1400, 9000, 100):
            assert suite.within(length).longest <= length
    with pytest.raises(ValueError, match=r"context of 512 tokens is too short.* takes 998"):
        SUITES["quick"].within(512)


def test_requests_are_no_longer_than_said(smollm2):
    suite = Suite(1, 50, (900, 1800), 1, 1)
    material = make_material(smollm2, [package_text()], suite)
    longest = max(len(question.token_ids) for question in material.questions)
    assert longest + NEW_TOKENS <= suite.longest < 1.2 * longest


@pytest.mark.parametrize("text", ["他折好报纸放在窗台上。", "x = {'a': [1, 2], 'b': 3}; "])
def test_facts_stand_where_they_should(smollm2, text):
    """In texts that have no sentences of English."""
    material = make_material(smollm2, [text * 2000], Suite(1, 50, (900,), 1, 0))
    for question in material.questions:
        shown = smollm2.decode(question.token_ids)
        behind = shown[shown.index(question.answer) :].partition("Question:")[0]
        found = len(smollm2.encode(behind))
        # Other facts stand behind it too, of some 15 tokens each.
        assert question.distance - 40 < found < question.distance + SPREAD + 200


def test_texts_that_are_too_short(smollm2):
    with pytest.raises(ValueError, match=r"which gives 0 pieces of 300 \(none crosses"):
        make_material(smollm2, ["Call me Ishmael."], SMALL)


def test_ways_have_equals(ways):
    assert next(iter(ways)) == FULL
    for name, way in ways.items():
        if name == FULL or name.startswith(EQUAL):
            assert way.equal is None
        else:
            assert ways[way.equal].of_texts["policy"] == "streaming"
    assert [name for name, way in ways.items() if way.is_control] == [RANDOM]


def masked_share(options, tokenizer, ids, last):
    """Share of tokens that the mask lets the last query see, or those that predict the second
    half."""
    config = SepLLMConfig.from_dict(options)
    found = resolve_kept(config, tokenizer)
    bounds = {"max_separators": config.max_separator_tokens, "interval": config.interval}
    after = None
    if config.keep_after:
        behind: dict[int, int] = {}
        for number, of in found.keep_after:
            behind.update({token: max(number, behind.get(token, 0)) for token in of})
        after = KeptAfter(behind, set(found.segment_ends))
    sizes = config.num_sink_tokens, config.window_size
    mask = np.asarray(sepllm_mask(list(ids), found.token_ids, *sizes, after=after, **bounds))
    queries = [-1] if last else range(len(ids) // 2 - 1, len(ids) - 1)
    full = np.tril(np.ones_like(mask))
    kept, everything = (m[list(queries)].sum() for m in (mask, full))
    dense = len(set(config.dense_layers)) / LAYERS
    return dense + (1 - dense) * kept / everything


def test_equal_means_equal_kv(ways, material, smollm2):
    """By the explicit mask, over all layers: at the end of each document, and over the second
    halves of texts."""
    for way in ways.values():
        if way.equal is None:
            continue
        equal = ways[way.equal]
        for group, ids in material.groups.items():
            mine, other = (
                masked_share(of.of_groups[group], smollm2, ids[0], last=True) for of in (way, equal)
            )
            # Windows within 2 % are one way, and they are whole tokens.
            assert other == pytest.approx(mine, rel=0.02, abs=1 / 250), (way.name, group)
        mine, other = (
            sum(masked_share(of.of_texts, smollm2, ids, last=False) for ids in material.texts)
            for of in (way, equal)
        )
        assert other == pytest.approx(mine, rel=0.02, abs=1 / 75), way.name
        shown, ideal = (of.ideal(material, smollm2, LAYERS) for of in (way, equal))
        assert ideal["texts"] == pytest.approx(shown["texts"], rel=0.02, abs=1 / 150)


def test_random_ids_are_as_many(ways, material, smollm2):
    """In all texts together; none is drawn that would be more."""
    kept = set(resolve_kept(SepLLMConfig(), smollm2).token_ids)
    drawn = set(ways[RANDOM].of_texts["keep"])
    ids = [token for text in (*material.texts, *material.documents) for token in text]
    wanted, found = (sum(token in some for token in ids) for some in (kept, drawn))
    assert 0 <= wanted - found <= 2
    assert not drawn & {*kept, *smollm2.all_special_ids}


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
    assert (found.mean, found.error, found.blocks) == (2.0, 1.0, 2)
    assert not found.is_clear
    same = nats_difference(first, first)
    assert (same.mean, same.error) == (0.0, 0.0)
    assert not same.is_clear
    assert math.isinf(nats_difference([[1.0]], [[0.0]]).error)


@pytest.mark.parametrize(
    ("blocks", "most"),  # Student's t between which are 95 %, from a table
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (8, 2.365), (16, 2.131), (384, 1.966)],
)
def test_chance_of_a_difference(blocks, most):
    for sign in (-1, 1):
        assert Difference(sign * most, 1.0, blocks).chance == pytest.approx(0.05, abs=2e-4)
        assert Difference(sign * (most + 0.01), 1.0, blocks).is_clear
        assert not Difference(sign * (most - 0.01), 1.0, blocks).is_clear


def test_parts_of_different_sizes_count_by_their_size():
    """One document of 22 pages at 60 %, two of 44 at 30 %: 36 %, and not 40."""
    parts = [
        {"requests": 1, "pages": 13.2, "of": 22},
        {"requests": 2, "pages": 13.2, "of": 44},
    ]
    held = join({0: "a", 1: "b", 2: "c"}, parts)["held"]
    assert held["pages"] / held["of"] == pytest.approx(0.36)


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


def result(material, nats, right, same=1.0, held=1.0):
    """Of a way that predicts so well, answers the first ``right`` questions, has the likeliest
    token of full attention at a share of all places, and holds a share of its memory."""
    replies = [f" {q.answer}." if n < right else " no" for n, q in enumerate(material.questions)]
    halves = [len(text) // 2 for text in material.texts]
    likeliest = [[1] * round(same * half) + [2] * round((1 - same) * half) for half in halves]
    texts = {"nats": [[nats] * half for half in halves], "likeliest": likeliest}
    of_texts = {"mean": 100.0 * held, "peak": 200.0}
    of_questions = {"mean": 300.0 * held, "peak": 900.0 * held}
    return {
        "texts": {**texts, "held": of_texts},
        "questions": {"replies": replies, "held": of_questions},
    }


@pytest.fixture
def found(ways, material, smollm2):
    """Figures of made-up results: random ids predict worse than separators."""
    full = {**result(material, 3.0, 18), "without": {"replies": [" no"] * len(material.without)}}
    results = {
        FULL: full,
        SEPLLM: result(material, 3.2, 0, 0.8, 0.3),
        RANDOM: result(material, 3.3, 0),
    }
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
    sepllm = found[SEPLLM]
    assert sepllm.agreement == 0.8
    assert sepllm.held["texts"] == {"mean": pytest.approx(0.3), "peak": 1.0}
    assert sepllm.held["questions"] == {"mean": pytest.approx(0.3), "peak": pytest.approx(0.3)}


def test_controls_that_move(found, material):
    checks = controls(found, material.questions, material.without)
    assert [(name, sees) for name, sees, _ in checks] == [
        ("facts taken out", True),
        ("random ids for separators", True),
    ]
    shown = markdown("title", "about", found, material.questions, material.without)
    assert "blind" not in shown
    assert "**SepLLM**: worse at predicting text (24.53 and 22.20, +0.1000 nats per token" in shown
    assert "fewer questions answered (0 and 9 of 27, chance 0.00)" in shown


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
    assert "not shown to be better than any other tokens" in shown


def test_a_control_that_is_not_run_is_named(found, material):
    def shown():
        return markdown("title", "about", found, material.questions, material.without)

    del found[RANDOM]
    assert "random ids for separators: Not measured: it failed" in shown()
    del found[SEPLLM]
    assert "random ids for separators: Not run" in shown()


def test_each_equal_stands_behind_its_way(found, ways):
    assert ordered(found) == [FULL, SEPLLM, ways[SEPLLM].equal, RANDOM]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--suite", "long"], "--suite 'long': must be one of quick, full"),
        (["--window", "0"], "--window 0: must be at least 1"),
        (["--window", "600"], "--window 600: must be at most half of the shortest document, 350"),
        (["--engine", "attention_backend=CPU_ATTN"], "--engine attention_backend: is set by this"),
        (["--only", "H3O"], f"--only 'H3O': must be one of {SEPLLM!r}, "),
        (["-o", "window_size=0"], "window_size=0: must be at least 1"),
        (["-o", "heavy_ratio=0.1"], "heavy_ratio"),
        (["-o", "keep=[99999999]"], "99999999"),
        (["--engine", "tensor_parallel_size=two"], "tensor_parallel_size='two': must be a number"),
        (["--engine", "tensor_parallel_size=0"], "tensor_parallel_size=0: must be a number"),
        (["--engine", "tensor_parallel_size=null"], "tensor_parallel_size=None: must be a number"),
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


RULE = {"num_sink_tokens": 2, "window_size": 48, "keep": ["separators", "digits"]}
RULE |= {"max_separator_tokens": 30, "dense_layers": [0]}


def test_a_rule_that_the_model_carries(smollm2, tmp_path, monkeypatch):
    """It is measured as the user's options are, and changes nothing of the other ways."""
    from helpers import SMOLLM2

    read = replace(cli.read_model(str(SMOLLM2)), rule=RULE)
    monkeypatch.setattr(cli, "read_model", lambda name: read)
    given = cli.Given(str(SMOLLM2), (), "quick", 128, "float32", tmp_path, (YOURS,))
    config = SepLLMConfig.from_dict(cli.prepare(given).ways[1].of_texts)
    assert {name: getattr(config, name) for name in RULE} == {
        **RULE,
        "keep": ("separators", "digits"),
        "dense_layers": (0,),
    }
    mine = cli.prepare(given.with_options({"window_size": 64}, {})).ways[1].of_texts
    assert (mine["window_size"], mine["max_separator_tokens"]) == (64, 30)
    assert served(None) is None
    for options in usual_options(128, True).values():
        asked = SepLLMConfig.from_dict(options)
        assert with_rule(served(options), RULE, "the model") == asked


def test_one_run_writes_to_a_folder(tmp_path):
    with written_to(tmp_path / "a"):
        with written_to(tmp_path / "b"):
            pass
        other = written_to(tmp_path / "a")
        with pytest.raises(InputError, match="another run writes to it"), other:
            pytest.fail("both would write")
    with written_to(tmp_path / "a"):
        pass


def test_nothing_is_run_from_the_current_folder(tmp_path, monkeypatch):
    """It may be that of a model from somewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gzip.py").write_text("open('marker', 'w')")
    with child("vllm_sepllm.evaluation.worker", tmp_path / "no job", tmp_path / "log") as started:
        assert "No such file" in started.failure()
    assert not (tmp_path / "marker").exists()


def test_code_of_a_model_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it was asked about"))
    with pytest.raises(InputError, match="has no configuration to evaluate by"):
        cli.read_model(str(tmp_path))
    assert not (tmp_path / "marker").exists()


def test_a_chat_template_that_takes_no_conversation(smollm2, monkeypatch):
    template = "{{ raise_exception('roles must be saints') }}"
    monkeypatch.setattr(smollm2, "chat_template", template)
    with pytest.raises(ValueError, match=r"takes no conversation \(roles must be saints\): mend"):
        chat_ids(smollm2, "Hello")


def test_what_a_tokenizer_lacks_is_left_out():
    """One without digits."""

    class Words(ListedWords):
        words = (".", ",", "the", "The", "Anna")

    options = {name: {"keep": [name]} for name in ("separators", "digits", "capitalized")}
    found, refused = possible(options, Words())
    assert list(found) == ["separators", "capitalized"]
    assert list(refused) == ["digits"]
    assert "has no such token" in str(refused["digits"])


def test_what_is_not_served_is_marked(ways, found, material, smollm2, tmp_path):
    """Its pages are counted, it has no peak, and it is no part of the front."""
    all_ways = list(ways.values())
    [h2o, *_] = unserved_ways([H2O], all_ways, 256)
    made = result(material, 2.9, 30)
    for task, share in (("texts", 0.3), ("questions", 0.2)):
        made[task]["held"] = {"requests": 1, "pages": 100 * share, "of": 100}
    ideal = h2o.ideal(material, smollm2, LAYERS)
    mine = figures(h2o, made, found[FULL].result, material.questions, ideal)
    assert mine.held == {
        "texts": {"mean": 0.3, "peak": None},
        "questions": {"mean": 0.2, "peak": None},
    }
    both = {**found, h2o.name: mine}
    row = next(row for row in summary(both, material.questions) if "H2O" in row[0])
    assert row[:3] == ["H2O, KV of SepLLM (not served)", "30.0%", ""]
    assert as_json(both, material.questions)[h2o.name]["served"] is False
    assert as_json(both, material.questions)[SEPLLM]["served"] is True
    assert sentence(both, h2o.name).startswith("**H2O, KV of SepLLM (not served)**: ")
    plot(both, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_chats_of_a_tokenizer_that_writes_them_itself(tmp_path):
    """Mistral's has no template."""
    pytest.importorskip("mistral_common")  # comes with vLLM
    write_tekken(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert not tokenizer.chat_template
    found = chat_ids(tokenizer, "he", "ll", "he")
    chat = [
        {"role": "user", "content": "he"},
        {"role": "assistant", "content": "ll"},
        {"role": "user", "content": "he"},
    ]
    assert found == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert found != tokenizer.encode("he\n\nAnswer: ll\n\nhe\n\nAnswer:")


def test_a_long_chat_template_has_room(smollm2, material):
    assert longest_request(SMALL, material, 4096) == max(SMALL.longest, material.longest)
    with pytest.raises(ValueError, match=rf"takes {material.longest} tokens .* can have 200"):
        longest_request(SMALL, material, 200)
    asked = replace(material.questions[0], token_ids=(1,) * 5000)
    long = replace(material, questions=(*material.questions, asked))
    assert longest_request(SMALL, long, 8192) == 5000 + NEW_TOKENS
