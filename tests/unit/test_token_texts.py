# ruff: noqa: RUF001
"""Texts of tokens, with tokenizers of every common kind."""

import made_tokenizers
import pytest

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.kept_ids import resolve_kept
from vllm_sepllm.separators import resolve_separators
from vllm_sepllm.token_texts import num_token_ids, texts_of, token_texts

pytestmark = pytest.mark.unit
pytest.importorskip("transformers", reason="needs transformers")


def separators_of(tokenizer, **options):
    """The vocabulary's own spelling of each separator."""
    found = resolve_separators(SepLLMConfig(**options), tokenizer)
    return set(tokenizer.convert_ids_to_tokens(list(found.token_ids)))


@pytest.mark.parametrize("cleanup", [True, False], ids=["decoder cleans up", "it does not"])
@pytest.mark.parametrize("words", [made_tokenizers.WORDS, ("一", "二"), ("#",)], ids=str)
def test_wordpiece(cleanup, words):
    """The space before a mark is the decoder's, not the token's."""
    tokenizer = made_tokenizers.wordpiece(cleanup, words, clean_up_tokenization_spaces=True)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    texts = dict(zip(pieces, token_texts(tokenizer), strict=True))
    assert {mark: texts[mark] for mark in made_tokenizers.MARKS} == {
        mark: mark for mark in made_tokenizers.MARKS
    }
    assert (texts["##,"], texts["##ing"], texts["[SEP]"]) == (",", "ing", "[SEP]")
    assert separators_of(tokenizer) == {*".,?!;:", "##,"}
    assert separators_of(tokenizer, separators=["cjk"]) == {"。", "，"}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_with_bytes(kind):
    """A byte that is a character, such as a newline, is that character."""
    tokenizer = made_tokenizers.sentencepiece(kind)
    bytes_of = {f"<0x{ord(char):02X}>" for char in ".,?!;: \t\n"}
    assert separators_of(tokenizer) == {*".,?!;:", "▁"} | bytes_of
    spaced = {"▁,", "▁.", "▁▁"}
    assert separators_of(tokenizer, separator_match="composed") == (
        {*".,?!;:", "▁"} | bytes_of | spaced
    )
    assert separators_of(tokenizer, separators=["。", "，"]) == {"。", "，"}


@pytest.mark.parametrize("corrupts", [True, False])
def test_byte_level(corrupts):
    """Neither clean-up by Hugging Face's decode nor parts of characters deceive it."""
    tokenizer = made_tokenizers.byte_level(
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=corrupts,
    )
    if corrupts:
        comma = tokenizer.convert_tokens_to_ids("Ġ,")
        assert tokenizer.decode([70, comma], skip_special_tokens=False).endswith(",")
        assert " ," not in tokenizer.decode([70, comma], skip_special_tokens=False)
    assert separators_of(tokenizer) == {*".,?!;:", "Ġ", "ĉ", "Ċ"}
    composed = separators_of(tokenizer, separator_match="composed")
    assert composed == {*".,?!;:", "Ġ", "ĉ", "Ċ", "Ġ,", "Ġ.", "ĊĊ"}
    assert separators_of(tokenizer, separators=["cjk"]) == {"ãĢĤ"}
    assert separators_of(tokenizer, separators=["<|im_end|>"]) == {"<|im_end|>"}


@pytest.mark.parametrize(
    "make",
    [made_tokenizers.byte_level, made_tokenizers.characters],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("alphabet", ["ACGTN|", "|.;", "NACGT| "])
def test_vocabularies_without_the_letter_a(make, alphabet):
    if make is made_tokenizers.byte_level:
        alphabet = alphabet.replace(" ", "Ġ")
    tokenizer = make(alphabet)
    assert separators_of(tokenizer, separators=["|"]) == {"|"}
    if " " in alphabet:
        assert separators_of(tokenizer, separators=[" "]) == {" "}


def test_tokens_beyond_gaps_and_beyond_the_length():
    tokenizer = made_tokenizers.characters("NACGT|", first_id=50)
    bar = tokenizer.convert_tokens_to_ids("|")
    assert bar == 55 > len(tokenizer)
    assert num_token_ids(tokenizer) == 56
    assert separators_of(tokenizer, separators=["|"]) == {"|"}
    assert token_texts(tokenizer)[10] == ""


def test_tokens_that_are_added():
    """A chat template brings tokens of its own, some of which are kept."""
    tokenizer = made_tokenizers.characters("ab|Q")
    assert separators_of(tokenizer, separators=["|"]) == {"|"}
    keep = SepLLMConfig(keep=("capitalized",))
    capitals = resolve_kept(keep, tokenizer).token_ids
    tokenizer.add_tokens(["||", "Zürich"])
    mark, name = tokenizer.convert_tokens_to_ids(["||", "Zürich"])
    assert token_texts(tokenizer)[name] == "Zürich"
    assert resolve_kept(keep, tokenizer).token_ids == (*capitals, name)
    marks = SepLLMConfig(separators=("|",), separator_match="composed")
    assert mark in resolve_separators(marks, tokenizer).token_ids


def test_an_id_that_is_too_large():
    """It is refused before a list of so many is made."""

    class Huge(made_tokenizers.ListedWords):
        words = ("a", ".")
        max_token_id = 2**32 - 6

    with pytest.raises(ConfigError, match="it has the id 4294967290, and must have none above"):
        resolve_separators(SepLLMConfig(), Huge())


class Strict:
    """vLLM's protocol and nothing else; ids from 10 to 19 stand for nothing."""

    pieces = ("<s>", "x", "y", ".", ",", " ,")

    def __len__(self):
        return len(self.pieces)

    @property
    def max_token_id(self):
        return 24

    def get_vocab(self):
        raise NotImplementedError

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self._piece(i) for i in ids)

    def _piece(self, token_id):
        if 10 <= token_id < 20:
            raise KeyError(token_id)
        return self.pieces[token_id % 20]


def test_the_protocol_alone_is_enough():
    found = resolve_separators(SepLLMConfig(), Strict())
    assert found.token_ids == (3, 4, 23, 24)


def test_ids_that_cannot_be_decoded_have_no_text():
    assert texts_of(Strict(), [3, 12, 23]) == [".", "", "."]


class Broken(Strict):
    def decode(self, ids, skip_special_tokens=False):
        raise OSError("the vocabulary file is gone.\nmore")


class Unhashable(Strict):
    __hash__ = None


def test_a_tokenizer_that_cannot_be_remembered():
    assert resolve_separators(SepLLMConfig(), Unhashable()).token_ids == (3, 4, 23, 24)


@pytest.mark.parametrize("error", [TypeError, IndexError, RuntimeError, OSError])
def test_any_failure_is_one_sentence_with_the_remedy(monkeypatch, error):
    def fail(self, ids, skip_special_tokens=False):
        raise error("the vocabulary is gone.\nmore")

    monkeypatch.setattr(Broken, "decode", fail)
    with pytest.raises(ConfigError) as caught:
        resolve_separators(SepLLMConfig(), Broken())
    message = str(caught.value)
    for part in ("(Broken)", f"{error.__name__}: the vocabulary is gone)", "separator_token_ids"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("tokenizer", [None, Broken()], ids=["none", "broken"])
@pytest.mark.parametrize(
    ("options", "ids"),
    [({"separator_token_ids": [7, 3]}, (3, 7)), ({"policy": "streaming"}, ())],
)
def test_nothing_is_looked_up_where_ids_are_given(tokenizer, options, ids):
    found = resolve_separators(SepLLMConfig(**options), tokenizer)
    assert found.token_ids == ids
    assert found.texts == tuple(f"<id {i}>" for i in ids)
