"""Documents with facts in them, and what counts as knowing one."""

import pytest
from helpers import BOOK

from vllm_sepllm.evaluation.facts import DISTANCES, SPREAD, WORDINGS, Fact, hide_facts

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def book_ids(tokenizer):
    return tokenizer.encode(BOOK.read_text(encoding="utf-8"), add_special_tokens=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_document(book_ids, tokenizer, seed):
    document = hide_facts(book_ids, tokenizer, seed)
    assert document == hide_facts(book_ids, tokenizer, seed)
    kinds = [(fact.distance, fact.kind) for fact in document.facts]
    assert sorted(kinds) == sorted((d, kind) for d in DISTANCES for kind in WORDINGS)
    assert len({fact.sentence for fact in document.facts}) == len(kinds)
    for fact in document.facts:
        before, after = document.text.split(fact.sentence)
        assert not before.strip() or before.rstrip()[-1] in ".?!\"'”’", before[-30:]  # noqa: RUF001
        for other in document.facts:  # the book's tokens count
            after = after.replace(f"{other.sentence} ", "")
        behind = len(tokenizer.encode(after, add_special_tokens=False))
        sentence = 150  # at whose beginning it stands
        assert fact.distance - 2 <= behind < fact.distance + SPREAD + sentence
        assert document.text.count(fact.sentence) == 1


def test_facts_can_be_taken_out(book_ids, tokenizer):
    document = hide_facts(book_ids, tokenizer, 1)
    without = document.without_facts()
    for fact in document.facts:
        assert fact.sentence not in without.text
    lengths = sum(len(fact.sentence) + 1 for fact in document.facts)
    assert len(without.text) == len(document.text) - lengths


FACT = Fact("word", 300, "Anna has a goat as a pet.", "Which animal does Anna have?", "goat")


@pytest.mark.parametrize(
    ("reply", "right"),
    [(" goat as", True), ("goat", True), ("goats", False), ("a goat", False), ("", False)],
)
def test_replies(reply, right):
    assert FACT.beginning == "Anna has a"
    assert FACT.is_right(reply) == right


def test_numbers_are_whole():
    fact = Fact("number", 300, "The number of Anna is 123.", "", "123")
    assert fact.beginning == "The number of Anna is"
    assert fact.is_right(" 123.")
    assert not fact.is_right(" 1234")


def test_a_book_that_is_too_short(tokenizer):
    with pytest.raises(ValueError, match="the book has 5 tokens: it must have more than 3680"):
        hide_facts([1] * 5, tokenizer, 0)
