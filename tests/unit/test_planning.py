# ruff: noqa: RUF001
"""What memory is planned for."""

import json
import os

import pytest

from vllm_sepllm import planning
from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.kept_ids import resolve_kept
from vllm_sepllm.planning import Plan, lists_for, make_plan, read_planning_text, sample_shares
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.samples import SAMPLES
from vllm_sepllm.separators import resolve_separators

pytestmark = pytest.mark.unit


class Characters:
    """A token per character, its code point."""

    def __len__(self):
        return 0x10000

    def encode(self, text, add_special_tokens=True):
        return [ord(char) for char in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


class CannotEncode(Characters):
    def encode(self, text, add_special_tokens=True):
        raise KeyError("the")


CHARACTERS = Characters()  # its texts are read once


def plan_of(tokenizer, **options):
    config = SepLLMConfig(**options)
    resolved = resolve_kept(config, tokenizer).resolve(config)
    return make_plan(resolved, KeepRule.of(resolved, 0x10000), tokenizer)


def spans_of_ids():
    config = SepLLMConfig(keep=(5,), keep_after=3, segment_ends=(7,))
    return config, KeepRule.of(config, 100)


def test_samples_are_several_hundred_characters_of_their_script():
    assert len(SAMPLES) == 10
    letters = {
        "Chinese": ("一", "鿿"),
        "Japanese": ("ぁ", "ん"),
        "Korean": ("가", "힣"),
        "Russian": ("А", "я"),
        "Arabic": ("ء", "ي"),
        "Hindi": ("अ", "ह"),
        "Thai": ("ก", "ฮ"),
        "English": ("A", "z"),
    }
    for name, text in SAMPLES.items():
        assert len(text) > 250
        first, last = letters.get(name, ("A", "z"))
        assert sum(first <= char <= last for char in text) > 0.25 * len(text), name


def test_what_is_kept_behind_others_is_planned_for():
    """In characters: a comma and the three behind it."""
    text = SAMPLES["English"]
    expected = ["," in text[max(0, i - 3) : i + 1] for i in range(len(text))]
    config = SepLLMConfig(keep=(",",), keep_after=3, segment_ends=(), num_sink_tokens=0)
    rule = KeepRule.of(resolve_kept(config, CHARACTERS).resolve(config), 0x10000)
    shares = sample_shares(rule, CHARACTERS)
    assert shares["English"] == pytest.approx(sum(expected) / len(expected))
    plan = plan_of(CHARACTERS, keep=(",",), keep_after=3, segment_ends=())
    assert plan.share == max(shares.values()) > plan_of(CHARACTERS, keep=(",",)).share


def test_the_largest_share_among_the_samples_counts(pythia):
    chinese = plan_of(pythia, separators=["，", "。", "、", "？"])
    ids = pythia.encode(SAMPLES["Chinese"])
    marks = set(pythia.convert_tokens_to_ids(pythia.tokenize("，。、？")))
    assert len(marks) == 4
    assert chinese.share == pytest.approx(sum(i in marks for i in ids) / len(ids))
    assert chinese.source == "sample text: Chinese"
    assert chinese.margin == planning.PLANNING_MARGIN > 1
    assert chinese.covers_samples
    assert {"English", "Thai", "code"} <= set(chinese.scarce)
    assert "Chinese" not in chinese.scarce
    standard = plan_of(pythia)
    assert standard.source == "sample text: code"
    assert standard.scarce == ("Chinese", "Japanese")
    shares = [plan_of(pythia, separators=[mark]).share for mark in ".,?!;: "]
    assert standard.share >= max(shares)


def test_lists_that_would_help(pythia):
    scarce = ("Chinese", "Japanese", "Arabic", "Thai")
    found = resolve_separators(SepLLMConfig(), pythia).texts
    assert lists_for(scarce, pythia, found) == ("cjk", "arabic")
    assert lists_for(scarce, None, found) == ()
    assert lists_for((), pythia, found) == ()
    assert lists_for(scarce, CannotEncode(), CHARACTERS.decode(range(0x10000))) == ()


@pytest.mark.parametrize(
    ("options", "share", "source"),
    [
        ({"policy": "streaming"}, 0.0, "policy='streaming'"),
        ({"policy": "fixed_interval", "interval": 5}, 0.2, "interval=5"),
        ({"separator_token_ids": []}, 0.0, "keep=[]"),
        ({"keep": []}, 0.0, "keep=[]"),
    ],
)
def test_shares_that_no_text_decides(options, share, source):
    for tokenizer in (None, CHARACTERS):
        plan = plan_of(tokenizer, **options)
        assert (plan.share, plan.source, plan.margin) == (share, source, 1.0)
        assert not plan.scarce


@pytest.mark.parametrize(
    "tokenizer", [None, CHARACTERS, CannotEncode()], ids=["none", "characters", "cannot encode"]
)
@pytest.mark.parametrize("ids", [[46], []], ids=str)
def test_a_given_share_is_taken_as_it_is(tokenizer, ids):
    plan = plan_of(tokenizer, separator_token_ids=ids, planned_kept_share=0.01)
    assert (plan.share, plan.source, plan.margin) == (0.01, "planned_kept_share", 1.0)


def test_a_given_share_below_that_of_a_sample():
    plan = plan_of(CHARACTERS, separators=["a", "e", "o"], planned_kept_share=0.01)
    assert (plan.most_kept, plan.covers_samples) == ("English", False)
    assert plan.largest_share > 0.1
    assert plan_of(CHARACTERS, separators=["a"], planned_kept_share=1).covers_samples


@pytest.mark.parametrize(
    ("tokenizer", "why"), [(None, "without a tokenizer"), (CannotEncode(), "cannot cut")]
)
def test_a_guess_where_nothing_can_be_estimated(tokenizer, why):
    plan = plan_of(tokenizer, separator_token_ids=[46])
    assert plan.share == planning.UNKNOWN_KEPT_SHARE
    spans = make_plan(*spans_of_ids(), None)
    assert spans.share == planning.UNKNOWN_KEPT_SHARE_OF_SPANS > plan.share
    assert "a guess" in plan.source
    assert why in plan.source


def test_a_text_of_the_user(tmp_path):
    path = tmp_path / "chat.txt"
    path.write_text("abc.\n" * 100, encoding="utf-8")
    plan = plan_of(CHARACTERS, separators=["."], planning_text=str(path))
    assert (plan.share, plan.source) == (0.2, "planning_text")
    assert plan.margin == planning.PLANNING_MARGIN


def test_a_text_is_cut_at_a_character_of_the_largest_size(tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "。".encode() * 300)
    for size in range(100, 108):
        monkeypatch.setattr(planning, "LARGEST_TEXT", size)
        assert read_planning_text(str(path)) == "。" * ((size - 3) // 3)


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chat.txt").write_text("abc")
    assert read_planning_text("~/chat.txt") == "abc"


def make_pipe(path):
    os.mkfifo(path)  # nobody writes to it, and nothing waits for that


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["cannot be read (No such file or directory)"]),
        (lambda path: path.mkdir(), ["cannot be read|is no file", "path of a UTF-8 text file"]),
        (make_pipe, ["is no file"]),
        (lambda path: path.write_bytes(b""), ["is empty"]),
        (lambda path: path.write_bytes(b" \n"), ["is empty"]),
        (lambda path: path.write_bytes(b"ab\xff"), ["is not UTF-8 at byte 2", "iconv"]),
        (lambda path: path.write_bytes("。".encode()[:2]), ["is not UTF-8 at byte 0"]),
        (lambda path: path.write_text("too short"), ["has 9 tokens", "at least 100"]),
    ],
    ids=["none", "folder", "pipe", "empty", "blank", "bytes", "cut", "short"],
)
def test_texts_that_cannot_be_used(tmp_path, make, parts):
    path = tmp_path / "text"
    make(path)
    with pytest.raises(ConfigError) as caught:
        plan_of(CHARACTERS, separators=["."], planning_text=str(path))
    message = str(caught.value)
    assert message.startswith(f"planning_text={str(path)!r} ")
    for part in parts:
        assert any(choice in message for choice in part.split("|"))


def test_a_path_that_is_none():
    with pytest.raises(ConfigError, match="cannot be read"):
        read_planning_text("a\0b")


@pytest.mark.parametrize(
    ("tokenizer", "part"), [(None, "skip_tokenizer_init"), (CannotEncode(), "KeyError: 'the'")]
)
def test_a_text_that_cannot_be_cut(tmp_path, tokenizer, part):
    path = tmp_path / "text"
    path.write_text("abc." * 100)
    with pytest.raises(ConfigError) as caught:
        plan_of(tokenizer, separator_token_ids=[46], planning_text=str(path))
    assert part in str(caught.value)
    assert "set planned_kept_share instead" in str(caught.value)


def test_a_plan_survives_json():
    plan = Plan(0.2, "sample text: Thai", 1.25, "Thai", 0.2, ("Chinese", "code"), ("cjk",))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
