"""What the option ``keep`` stands for in a tokenizer."""

import json

import pytest
from helpers import BOOK, ROOT
from made_tokenizers import ListedWords

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.keep_classes import LISTED, has_digits, is_capitalized, is_name, special_ids
from vllm_sepllm.kept_ids import notes_of, resolve_kept
from vllm_sepllm.planning import kept_share
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.separators import resolve_separators
from vllm_sepllm.token_texts import num_token_ids, token_texts

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("text", ["7", " 2019", "3.", "$5", "-7", "10%", "٣", "८", "1\n", "3,5"])
def test_digits(text):
    assert has_digits(text)


@pytest.mark.parametrize("text", ["", " ", ".", "x2", "5th", "²", "½", "Ⅷ", "一", "+", "0x"])
def test_no_digits(text):
    assert not has_digits(text)


@pytest.mark.parametrize("text", ["A", " Alice", "NASA", "I", "\n\nThe", " Élan", "ǅ", " Ж", "Ab3"])
def test_capitalized(text):
    assert is_capitalized(text)


@pytest.mark.parametrize("text", ["", " ", "the", " iPhone", "7A", "'S", ".A", "ß", "字", "_X"])
def test_not_capitalized(text):
    assert not is_capitalized(text)


@pytest.mark.parametrize("text", [" Alice", "Lon", "NASA", " Ж", "\n\nWatson", " Theo"])
def test_names(text):
    assert is_name(text)


@pytest.mark.parametrize("text", ["The", " He", "\n\nBut", "I", " WHAT", "alice", "7", ""])
def test_no_names(text):
    assert not is_name(text)


# Ids of each class in the vocabulary: of digits, capitalized, special.
COUNTS = {"tokenizer": (40, 443, 2), "pythia": (2037, 12902, 2), "smollm2": (10, 13895, 17)}


@pytest.mark.parametrize("name", COUNTS)
def test_classes_of_real_vocabularies(name, request):
    """Counted another way: from the texts that the tokenizer gives one by one."""
    tokenizer = request.getfixturevalue(name)
    config = SepLLMConfig(keep=("digits", "capitalized", "special"))
    found = resolve_kept(config, tokenizer).by_class
    assert tuple(map(len, found.values())) == COUNTS[name]
    anchor = tokenizer.encode("a", add_special_tokens=False)
    assert len(anchor) == 1
    for token_id in range(0, num_token_ids(tokenizer), 7):
        text = tokenizer.decode([*anchor, token_id], clean_up_tokenization_spaces=False)[1:]
        if "�" in text:
            continue
        letters, digits = any(map(str.isalpha, text)), any(map(str.isdecimal, text))
        assert (token_id in found["digits"]) == (digits and not letters), text
        start = text.strip()[:1]
        assert (token_id in found["capitalized"]) == (start.isupper() or start.istitle()), text
    assert found["special"] == tuple(range(COUNTS[name][2]))


# Of a PG19 book and of school problems: digits, capitalized.
SHARES = {
    ("tokenizer", "book"): (0.0, 0.0906),
    ("tokenizer", "problems"): (0.1989, 0.0435),
    ("pythia", "book"): (0.0, 0.1007),
    ("pythia", "problems"): (0.1817, 0.0618),
    ("smollm2", "book"): (0.0001, 0.1016),
    ("smollm2", "problems"): (0.2758, 0.0512),
}


@pytest.fixture(scope="module")
def texts():
    lines = (ROOT / "tests/data/gsm8k_train_64.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [f"{each['question']}\n{each['answer']}" for each in map(json.loads, lines)]
    return {"book": BOOK.read_text(encoding="utf-8"), "problems": "\n\n".join(problems)}


@pytest.mark.parametrize(("name", "kind"), SHARES)
def test_shares_of_texts(name, kind, request, texts):
    """What a class keeps of a text."""
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(texts[kind], add_special_tokens=False)
    for kept, share in zip(("digits", "capitalized"), SHARES[name, kind], strict=True):
        config = SepLLMConfig(keep=(kept,))
        config = config.with_kept_ids(resolve_kept(config, tokenizer).token_ids)
        found = kept_share(KeepRule.of(config, num_token_ids(tokenizer)), ids)
        assert round(found, 4) == share, kept


def test_classes_texts_and_ids_are_one_set(tokenizer):
    config = SepLLMConfig(keep=("separators", " the", "digits", 4000))
    found = resolve_kept(config, tokenizer)
    separators = resolve_separators(SepLLMConfig(), tokenizer).token_ids
    digits = resolve_kept(SepLLMConfig(keep=("digits",)), tokenizer).token_ids
    [the] = tokenizer.encode(" the", add_special_tokens=False)
    assert list(found.by_class) == ["separators", LISTED, "digits"]
    assert found.by_class[LISTED] == tuple(sorted((the, 4000)))
    assert found.token_ids == tuple(sorted({*separators, the, *digits, 4000}))
    # What is looked up may lie outside the model; what is given must not, and stays to be refused.
    assert found.below(100).token_ids == (*(i for i in found.token_ids if i < 100), 4000)


def test_the_default_is_the_separators_alone(tokenizer):
    found = resolve_kept(SepLLMConfig(), tokenizer)
    assert found.token_ids == resolve_separators(SepLLMConfig(), tokenizer).token_ids
    assert notes_of(SepLLMConfig(), found) == []


@pytest.mark.parametrize("keep", [(), (3, 9), ("separators", 3)])
def test_nothing_is_looked_up_for_ids(keep):
    config = SepLLMConfig(keep=keep, separator_token_ids=(9,) if "separators" in keep else None)
    expected = tuple(sorted({9, 3} if keep else ()))
    assert resolve_kept(config, None).token_ids == expected == config.kept_ids


class Lower(ListedWords):
    """Words in lower case, and no special tokens."""

    words = ("a", "b", ".", ",", "the")


@pytest.mark.parametrize("name", ["digits", "capitalized", "names", "special"])
def test_a_class_without_tokens_is_refused(name):
    with pytest.raises(
        ConfigError, match=f"keep holds '{name}': .*has no such token; leave it out"
    ):
        resolve_kept(SepLLMConfig(keep=("separators", name)), Lower())


def test_texts_that_are_no_tokens():
    config = SepLLMConfig(keep=("the", "digit", "zebra"))
    found = resolve_kept(config, Lower())
    assert (found.token_ids, found.missing) == ((4,), ("digit", "zebra"))
    [note] = notes_of(config, found)
    assert note.startswith("'digit' 'zebra' of keep are no single tokens in this tokenizer")
    assert "classes are separators, special, digits, capitalized" in note
    with pytest.raises(ConfigError, match=r"keep holds 'digit': no single token .* classes are"):
        resolve_kept(SepLLMConfig(keep=("digit",)), Lower())


def test_spans_of_classes_texts_and_ids(tokenizer):
    texts = token_texts(tokenizer)
    [the] = [i for i, text in enumerate(texts) if text == " the"]
    config = SepLLMConfig(
        keep=("digits", " the", 7), keep_after={"digits": 4, " the": 2}, segment_ends=(".", 9)
    )
    found = resolve_kept(config, tokenizer)
    digits = found.by_class["digits"]
    assert found.keep_after == ((4, digits), (2, (the,)))
    assert 9 in found.segment_ends
    others = {texts[i] for i in found.segment_ends if i != 9}
    assert "." in others
    assert all("." in text and not any(map(str.isalnum, text)) for text in others)
    resolved = found.resolve(config)
    assert resolved.keep == tuple(sorted({*digits, the, 7}))
    assert resolved.resolved_spans == (found.keep_after, found.segment_ends)
    assert notes_of(config, found) == []


def test_a_text_that_is_a_word_of_ours_is_that_text():
    class Words(ListedWords):
        words = ("a", "listed", "behind", ".")

    config = SepLLMConfig(keep=("a", "listed", "behind"), keep_after={"listed": 4, "behind": 2})
    assert resolve_kept(config, Words()).keep_after == ((4, (1,)), (2, (2,)))


def test_a_text_with_a_span_that_is_no_token_is_named():
    config = SepLLMConfig(keep=("the", "zebra"), keep_after={"zebra": 4})
    found = resolve_kept(config, Lower())
    assert found.resolve(config) == SepLLMConfig(keep=(4,))
    assert "'zebra' of keep is no single token" in notes_of(config, found)[0]


def test_nothing_ends_where_nothing_is_kept_behind(tokenizer):
    found = resolve_kept(SepLLMConfig(keep=("digits",)), tokenizer)
    assert (found.keep_after, found.segment_ends) == ((), ())


@pytest.mark.parametrize("name", ["tokenizer", "pythia", "smollm2"])
def test_default_segment_ends_of_real_vocabularies(name, request):
    tokenizer = request.getfixturevalue(name)
    found = resolve_kept(SepLLMConfig(keep_after=1), tokenizer)
    texts = token_texts(tokenizer)
    ends = {texts[i] for i in found.segment_ends}
    assert {".", "?", "!", ";", "\n"} <= ends
    assert not ends & {",", ":", "-", "3.5", ".com"}
    assert not found.missing_ends


def test_segment_ends_that_are_no_tokens():
    config = SepLLMConfig(keep=("the",), keep_after=2, segment_ends=(".", "§"))
    found = resolve_kept(config, Lower())
    assert (found.segment_ends, found.missing_ends) == ((2,), ("§",))
    [note] = notes_of(config, found)
    assert note.startswith("'§' of segment_ends: no token of this tokenizer has such a text")


def test_special_tokens_that_are_only_added_as_special(tokenizer):
    class Added:
        all_special_ids = (2,)
        added_tokens_decoder = {  # noqa: RUF012
            7: type("Token", (), {"special": True}),
            8: type("Token", (), {"special": False}),
        }

    assert special_ids(Added()) == (2, 7)
    assert special_ids(object()) == ()
    shown = {token_texts(tokenizer)[i] for i in special_ids(tokenizer)}
    assert shown == {"<s>", "</s>"} == set(tokenizer.all_special_tokens)


def test_the_class_of_the_documentation(added_class, tokenizer):
    config = SepLLMConfig.from_dict({"keep": [added_class, "digits"]})
    found = resolve_kept(config, tokenizer).by_class[added_class]
    texts = token_texts(tokenizer)
    assert found == tuple(i for i, text in enumerate(texts) if "-" in text)
    assert len(found) > 3
