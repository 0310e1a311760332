# ruff: noqa: RUF001
import unicodedata

import pytest

from vllm_sepllm.config import DEFAULT_SEPARATORS, ConfigError, SepLLMConfig
from vllm_sepllm.samples import SAMPLES
from vllm_sepllm.separator_lists import CJK, LIST_OF_SAMPLE, SEPARATOR_LISTS, separator_texts
from vllm_sepllm.separators import (
    match_separators,
    missing_texts,
    resolve_separators,
    separator_characters,
    token_texts,
)

pytestmark = pytest.mark.unit

# Order: . , ? ! ; : space tab newline
PYTHIA_EXACT = [15, 13, 32, 2, 28, 27, 209, 186, 187]
PYTHIA_STREAMING = [964, 1157, 3736, 2195, 3706, 1163, 2490, 50276, 586, 4928, 50275]
LLAMA3_EXACT = [13, 11, 30, 0, 26, 25, 220, 198]  # the paper's list has no tab
LLAMA3_TAB = 197
LLAMA3_STREAMING = {
    662: " .", 1174: " ,", 949: " ?", 758: " !", 2652: " ;", 551: " :", 720: " \n",
    256: "  ", 262: "    ",
}  # fmt: skip


class PieceTokenizer:
    """SentencePiece's habit: decoding drops the space that leads the whole text."""

    pieces = ("<s>", "▁a", "a", ".", "▁.", ",", "▁,", "▁", "▁▁", ".\n", "\n", "b.")

    def __init__(self):
        self.decoded = 0

    def __len__(self):
        return len(self.pieces)

    def encode(self, text, **kwargs):
        assert kwargs == {"add_special_tokens": False}
        return [self.pieces.index(f"▁{text}")]

    def decode(self, token_ids, **kwargs):
        assert kwargs["skip_special_tokens"] is False
        self.decoded += 1
        text = "".join(self.pieces[i] for i in token_ids).replace("▁", " ")
        return text.removeprefix(" ")


class BatchTokenizer(PieceTokenizer):
    def batch_decode(self, pairs, **kwargs):
        return [self.decode(pair, **kwargs) for pair in pairs]


def test_pythia_exact_is_the_papers_list(pythia):
    found = resolve_separators(SepLLMConfig(), pythia)
    assert set(found.token_ids) == set(PYTHIA_EXACT)
    by_id = dict(zip(found.token_ids, found.texts, strict=True))
    assert [by_id[i] for i in PYTHIA_EXACT] == list(".,?!;: \t\n")


def test_pythia_composed_holds_the_exact_and_the_streaming_list(pythia):
    found = resolve_separators(SepLLMConfig(separator_match="composed"), pythia)
    assert set(found.token_ids) > set(PYTHIA_EXACT) | set(PYTHIA_STREAMING)
    characters = set(DEFAULT_SEPARATORS)
    assert all(text and set(text) <= characters for text in found.texts)


def test_pythia_texts_are_one_per_id_and_keep_leading_spaces(pythia):
    texts = token_texts(pythia)
    assert len(texts) == len(pythia) == 50277
    for text in [" the", ".", " .", "\n\n", '."']:
        ids = pythia.encode(text, add_special_tokens=False)
        assert [texts[i] for i in ids] == [text]


def byte_level_texts() -> list[str]:
    """The first 256 tokens of a tiktoken vocabulary, Llama-3's among them: one byte each."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    return [bytes([byte]).decode("utf-8", errors="replace") for byte in order]


def test_llama3_exact_is_the_papers_list_and_the_tab():
    found = match_separators(byte_level_texts(), DEFAULT_SEPARATORS, "exact")
    assert set(found) == {*LLAMA3_EXACT, LLAMA3_TAB}


def test_llama3_composed_adds_the_streaming_list():
    texts = byte_level_texts() + ["x"] * 3000
    for token_id, text in LLAMA3_STREAMING.items():
        texts[token_id] = text
    found = match_separators(texts, DEFAULT_SEPARATORS, "composed")
    assert set(found) == {*LLAMA3_EXACT, LLAMA3_TAB, *LLAMA3_STREAMING}
    exact = match_separators(texts, DEFAULT_SEPARATORS, "exact")
    assert not set(exact) & set(LLAMA3_STREAMING)


@pytest.mark.parametrize(
    ("match", "separators", "expected"),
    [
        ("exact", [".", ","], {"."}),
        ("exact", [".", '."'], {".", '."'}),
        ("exact", [".\n\n"], {".\n\n"}),
        ("composed", ["."], {".", "..."}),
        ("composed", [".", "\n"], {".", "...", ".\n\n"}),
        ("composed", [".", '"'], {".", "...", '."'}),
        ("composed", [".\n\n"], {".", "...", ".\n\n"}),
        ("composed", ["a."], {"a."}),
        ("composed", ["a.", '"'], {"a."}),
        ("composed", ["1."], set()),
        ("composed", ["กำ.", "।"], set()),
    ],
)
def test_match_separators(match, separators, expected):
    texts = ["", ".", "...", ".\n\n", '."', "a.", "a", "�"]
    found = match_separators(texts, separators, match)
    assert {texts[i] for i in found} == expected
    assert list(found) == sorted(found)


def test_a_composed_text_with_letters_gives_no_characters(pythia):
    """Its letters, and its brackets, would make separators of hundreds of words and marks."""
    end = "<|endoftext|>"
    found = resolve_separators(SepLLMConfig(separators=(end,), separator_match="composed"), pythia)
    assert found.texts == (end,)
    both = SepLLMConfig(separators=(end, "."), separator_match="composed")
    texts = resolve_separators(both, pythia).texts
    assert {end, ".", "..."} <= set(texts)
    assert all(text == end or set(text) == {"."} for text in texts)


def test_names_stand_for_lists(pythia):
    named = resolve_separators(SepLLMConfig(separators=("default", "cjk", "—")), pythia)
    texts = (*DEFAULT_SEPARATORS, *CJK, "—")
    assert named == resolve_separators(SepLLMConfig(separators=texts), pythia)
    assert {"。", "，", "—", "."} <= set(named.texts)
    assert separator_texts(("default",)) == DEFAULT_SEPARATORS
    assert separator_texts((".", "thai", ".")) == (".", " ", "\n")


def test_lists_of_separators():
    parts = ("default", "cjk", "arabic", "devanagari", "thai")
    everything = {text for name in parts for text in SEPARATOR_LISTS[name]}
    assert set(SEPARATOR_LISTS["multilingual"]) == everything
    assert {*parts, "multilingual", "code", "markdown"} == SEPARATOR_LISTS.keys()
    scripts = {"cjk": "IDEOGRAPHIC FULLWIDTH", "arabic": "ARABIC", "devanagari": "DEVANAGARI"}
    for name, texts in SEPARATOR_LISTS.items():
        assert len(set(texts)) == len(texts), "a text is named twice"
        assert separator_characters(texts) == set("".join(texts)), "a text has letters"
        for text in texts if name in scripts else ():
            assert unicodedata.name(text).split()[0] in scripts[name]
    assert LIST_OF_SAMPLE.keys() == SAMPLES.keys()
    assert set(LIST_OF_SAMPLE.values()) <= SEPARATOR_LISTS.keys()


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, {"default": [" ", "\t", "\n", "?", "!", ";", ":"]}),
        ({"separators": ["."]}, {}),
        ({"separators": [".", "。", "<nope>"]}, {"": ["。", "<nope>"]}),
        ({"separators": [".", "cjk"]}, {"cjk": list(CJK)}),
        (
            {"separators": ["default", "—"]},
            {"default": [" ", "\t", "\n", "?", "!", ";", ":"], "": ["—"]},
        ),
        ({"separators": [".", "b."]}, {}),
        ({"separators": [".", "\n", ".\n\n", "。"], "separator_match": "composed"}, {"": ["。"]}),
        ({"separators": [".", "b.c"], "separator_match": "composed"}, {"": ["b.c"]}),
        ({"separators": ["。"], "separator_token_ids": [3]}, {}),
        ({"policy": "streaming"}, {}),
    ],
)
def test_missing_texts(options, missing):
    class Small(PieceTokenizer):
        pieces = ("<s>", "▁a", "a", ".", "▁.", ",", "▁,", "▁▁", ".\n", "b.")

    config = SepLLMConfig(**options)
    given = missing_texts(config, resolve_separators(config, Small()))
    assert {name: sorted(texts) for name, texts in given.items()} == {
        name: sorted(texts) for name, texts in missing.items()
    }


@pytest.mark.parametrize("kind", [PieceTokenizer, BatchTokenizer])
def test_leading_spaces_of_sentencepiece_tokens_count(kind):
    tokenizer = kind()
    comma = kind.pieces.index("▁,")
    assert tokenizer.decode([comma], skip_special_tokens=False) == ","  # alone, the space is lost
    exact = resolve_separators(SepLLMConfig(separators=(".", ",")), tokenizer)
    assert {kind.pieces[i] for i in exact.token_ids} == {".", ","}
    composed = resolve_separators(SepLLMConfig(separator_match="composed"), tokenizer)
    assert {kind.pieces[i] for i in composed.token_ids} == {
        ".", "▁.", ",", "▁,", "▁", "▁▁", ".\n", "\n",
    }  # fmt: skip
    assert composed.texts[composed.token_ids.index(comma)] == " ,"


@pytest.mark.parametrize("match", ["exact", "composed"])
def test_a_tokenizer_without_separators_is_refused(match):
    config = SepLLMConfig(separators=("¶", "§"), separator_match=match)
    with pytest.raises(ConfigError) as caught:
        resolve_separators(config, PieceTokenizer())
    for part in ["¶", "§", match, "12 tokens", "separator_token_ids"]:
        assert part in str(caught.value)


def test_token_ids_override_texts_and_may_be_unknown_to_the_tokenizer():
    config = SepLLMConfig(separators=("¶",), separator_token_ids=(500, 6))
    found = resolve_separators(config, PieceTokenizer())
    assert found.token_ids == (6, 500)
    assert found.texts == (" ,", "<id 500>")


def test_the_vocabulary_is_decoded_once_per_tokenizer():
    tokenizer = PieceTokenizer()
    first = resolve_separators(SepLLMConfig(), tokenizer)
    decoded = tokenizer.decoded
    assert decoded >= len(tokenizer)
    assert resolve_separators(SepLLMConfig(window_size=9), tokenizer) is first
    composed = resolve_separators(SepLLMConfig(separator_match="composed"), tokenizer)
    assert len(composed.token_ids) > len(first.token_ids)
    assert tokenizer.decoded == decoded
    other = PieceTokenizer()
    assert resolve_separators(SepLLMConfig(), other) == first
    assert other.decoded == decoded
