"""The pure parts of ``vllm-sepllm tune``: windows that fill a share, and successive halving."""

import json

import pytest
from typer.testing import CliRunner

from vllm_sepllm.cli import main
from vllm_sepllm.cli import tuning as tuning_command
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation import tune as tuning
from vllm_sepllm.evaluation.material import split
from vllm_sepllm.evaluation.search import (
    BOUNDS,
    FINEST,
    RULES,
    Candidate,
    Rung,
    Score,
    Shares,
    candidates,
    halve,
)
from vllm_sepllm.evaluation.share import mean_attended
from vllm_sepllm.evaluation.tune import FULL, rank_layers

pytestmark = pytest.mark.unit

LAYERS = 6


@pytest.fixture
def texts(book):
    return [book[:900], book[2000:2600]]


def share_of(options, tokenizer, texts):
    config = SepLLMConfig.from_dict(options)
    shares = [mean_attended(config, tokenizer, [text], LAYERS) / len(text) for text in texts]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("rule", list(RULES)[::3])
@pytest.mark.parametrize("bound", [None, 20])
def test_shares_are_those_that_are_attended(tokenizer, texts, rule, bound):
    options = dict(RULES[rule])
    if bound and options.get("policy") != "streaming":
        options["max_separator_tokens"] = bound
    shares = Shares(options, tokenizer, texts)
    for window in (1, 16, 100, 700, 5000):
        expected = share_of({**options, "window_size": window}, tokenizer, texts)
        assert shares.of(window) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_windows_are_as_wide_as_they_can_be(tokenizer, texts, share):
    shares = Shares({}, tokenizer, texts)
    window = shares.widest(share)
    assert window % FINEST == 0
    assert shares.of(window) <= share
    assert share == 1.0 or shares.of(window + FINEST) > share


def test_a_rule_that_keeps_more_than_the_share(tokenizer, book):
    texts = [book[:2000]]
    assert Shares({}, tokenizer, texts).widest(0.1) is None
    found = candidates({"separators": {}}, [()], 0.1, tokenizer, texts, LAYERS, (None, *BOUNDS))
    assert [one.options.get("max_separator_tokens") for one in found] == [64]


def test_candidates(tokenizer, texts):
    found = candidates(RULES, [(), (0, -1)], 0.45, tokenizer, texts, LAYERS, (None, *BOUNDS))
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    assert any("separators, window" in name and "dense" not in name for name in names)
    assert any("newest 64" in name for name in names)
    for one in found:
        assert one.share <= 0.45
        exact = share_of(one.options, tokenizer, texts)
        assert one.share == pytest.approx(exact)
        SepLLMConfig.from_dict(one.options)
        assert ("dense" in one.name) == ("dense_layers" in one.options)
    plain = {json.dumps(one.options) for one in found}
    assert len(plain) == len(found)


def test_a_bound_over_everything_is_left_out(tokenizer, texts):
    """256 newest separators are all there are in these texts."""
    found = candidates({"separators": {}}, [()], 0.5, tokenizer, texts, LAYERS, (None, *BOUNDS))
    assert [one.options.get("max_separator_tokens") for one in found] == [None, 64]


def made(number):
    return [Candidate(str(i), {"window_size": i + 1}, 0.5) for i in range(number)]


RUNGS = Rung((0,), (0,)), Rung((0, 1), (0, 1)), Rung((0, 1, 2, 3), (0, 1, 2))


@pytest.mark.parametrize("by_questions", [True, False])
def test_the_better_half_goes_on(by_questions):
    """Questions decide if they are asked for; else likelihood alone."""
    seen = []

    def measure(one, rung):
        seen.append((one.name, len(rung.texts)))
        number = int(one.name)
        return Score(nats=3 - number / 100, right=10 - number, of=20)

    best = halve(made(8), RUNGS, measure, by_questions)
    wanted = ["0", "1"] if by_questions else ["7", "6"]
    assert [one.name for one, _ in best] == wanted
    assert [len([x for x in seen if x[1] == n]) for n in (1, 2, 4)] == [8, 4, 2]


def test_what_is_not_measured_is_left_out():
    """Some cannot be served; then the time is over, and the last whole rung counts."""

    def measure(one, rung):
        if one.name == "0" or len(rung.texts) > 1:
            return None
        return Score(nats=float(one.name))

    assert [one.name for one, _ in halve(made(4), RUNGS, measure, False)] == ["1", "2", "3"]
    assert halve(made(4), RUNGS, lambda one, rung: None, False) == []


def test_layers_are_ranked_by_what_they_lose_alone():
    lost = [0.3, 0.0, 0.5, 0.1]

    def measure(one, rung):
        assert rung.documents == ()
        if one.options is None:
            return Score(nats=2.0)
        [layer] = set(range(4)) - set(one.options["dense_layers"])
        return Score(nats=2.0 + lost[layer])

    found = rank_layers(made(1)[0], 4, measure, RUNGS[1])
    assert [layer for layer, _ in found] == [2, 0, 3, 1]
    assert found[0][1] == pytest.approx(0.5)
    assert tuning._choices(found) == [(2,), (0, 2)]


def test_search_and_report_do_not_share_text():
    """Nothing that decided is in what is reported."""
    suite = tuning.SUITE
    for rung in tuning.RUNGS:
        assert max(rung.texts) < suite.num_texts
        assert max(rung.documents) < suite.num_documents
    assert tuning.REPORTED.texts == tuple(range(suite.num_texts, 2 * suite.num_texts))
    number = suite.num_documents
    assert tuning.REPORTED.documents == tuple(range(number, 2 * number))


@pytest.mark.parametrize("calibrate", [False, True])
def test_parts_of_the_text_have_nothing_in_common(tmp_path, calibrate):
    text = "".join(f"Sentence {i}. " for i in range(1000))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf8")
    parts = tuning_command._parts([str(file), str(file)], calibrate)
    assert len(parts) == 2 + calibrate
    assert [len(part) for part in parts] == [2] * len(parts)
    for number in range(2):
        assert "".join(part[number] for part in parts) == text
    assert min(len(part[0]) for part in parts) > len(text) / 4
    assert split("", 2) == ["", ""]
    assert split("abcdef", 3) == ["ab", "cd", "ef"]


def test_search_and_report_have_their_own_parts(tmp_path):
    """Every text and document is of the part it should be of, and the third is in neither."""
    from helpers import MODEL

    words = ("apple", "bread", "stone")
    parts = [[" ".join([f"The {word} is here."] * 4000)] for word in words]
    evaluation, tokenizer = tuning_command._prepare(MODEL, parts[:2], "float32", {}, tmp_path)
    material, suite = evaluation.material, tuning.SUITE
    assert len(material.texts) == 2 * suite.num_texts
    numbers = sorted({question.document for question in material.questions})
    assert numbers == list(range(2 * suite.num_documents))
    for index, text in enumerate(material.texts):
        said = tokenizer.decode(text)
        assert words[index >= suite.num_texts] in said
        assert sum(word in said for word in words) == 1
    for question in material.questions:
        said = tokenizer.decode(question.token_ids)
        assert f"The {words[question.document >= suite.num_documents]} is" in said
        assert sum(f"The {word} is" in said for word in words) == 1


class Answers:
    """In the place of an engine: names answer more questions, and a wide window predicts better."""

    num_late = 0

    def __init__(self):
        self.failed = {}

    def score(self, one, rung):
        if one.options is None:
            return Score(2.0, 9 * len(rung.documents), 9 * len(rung.documents))
        keeps = "keep_after" in one.options or "preset" in one.options
        nats = 3 - one.options["window_size"] / 1e4
        return Score(nats, 8 * len(rung.documents) * keeps, 9 * len(rung.documents))

    report = score


class Refusals(Answers):
    """Serves nothing."""

    def score(self, one, rung):
        self.failed[one.name] = "such heads are not served"


@pytest.mark.parametrize("by_questions", [True, False])
def test_a_search(tokenizer, texts, by_questions):
    """With facts asked for, a rule that holds them; else the widest window."""
    from types import SimpleNamespace

    evaluation = SimpleNamespace(
        material=SimpleNamespace(texts=texts[:1], documents=texts[1:]),
        model=SimpleNamespace(num_layers=LAYERS),
    )
    said = []
    found = tuning.tune(evaluation, Answers(), tokenizer, 0.6, by_questions, said.append)
    best = found.best[0][0]
    if by_questions:
        assert "keep_after" in best.options or "preset" in best.options
    else:
        assert best.options["policy"] == "streaming"
    names = [one.name for one, _ in found.reported]
    assert names[0] == FULL
    assert any(
        one.options and one.options.get("policy") == "streaming" for one, _ in found.reported
    )
    assert len(found.layers) == LAYERS
    assert said
    with pytest.raises(ValueError, match="no rule leaves a window within 1%"):
        tuning.tune(evaluation, Answers(), tokenizer, 0.01, by_questions, said.append)
    with pytest.raises(ValueError, match="no rule could be served: such heads are not served"):
        tuning.tune(evaluation, Refusals(), tokenizer, 0.6, by_questions, said.append)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--kv", "1.5"], "--kv 1.5: must be above 0 and below 1"),
        (["--kv", "0.3", "--minutes", "-1"], "--minutes -1.0: must be at least 0"),
        (["--kv", "0.3", "--minutes", "nan"], "--minutes nan: must be at least 0"),
        (["--kv", "0.3", "--model", "/no/such"], "model '/no/such' is no folder"),
        (["--kv", "0.3", "--text", "/no/such"], "text file '/no/such' cannot be read"),
    ],
)
def test_refused(tmp_path, arguments, part):
    from helpers import MODEL

    command = ["tune", "--model", MODEL, "--output", str(tmp_path / "out"), *arguments]
    found = CliRunner().invoke(main.app, command)
    assert found.exit_code == 2, found.output
    assert part in found.stderr
    assert not (tmp_path / "out").exists()
