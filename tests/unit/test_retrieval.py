"""Questions for facts, and how much of a text is attended to."""

import numpy as np
import pytest
from helpers import BOOK, find_separators, usual_spans

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.retrieval import DISTANCES, LENGTH, ask_for_number
from vllm_sepllm.evaluation.share import num_attended, window_of_equal_share
from vllm_sepllm.oracle.dense_mask import sepllm_mask

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def text():
    return BOOK.read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", range(8))
def test_a_question(text, tokenizer, seed):
    question = ask_for_number(text, tokenizer, seed)
    assert question == ask_for_number(text, tokenizer, seed)
    assert question.message.count(question.answer) == 1
    assert question.message.count(question.fact) == 1
    assert question.answer in question.fact
    before, after = question.message.split(question.fact)
    assert before.rstrip()[-1] in ".?!\"'”’", "the fact is within a sentence"  # noqa: RUF001
    behind = len(tokenizer.encode(after, add_special_tokens=False))
    least, most = DISTANCES
    assert least <= question.distance <= behind
    assert behind < most + 200  # the rest of a sentence, and the question
    total = len(tokenizer.encode(question.message, add_special_tokens=False))
    assert LENGTH < total < LENGTH + 80


def test_questions_differ(text, tokenizer):
    asked = [ask_for_number(text, tokenizer, seed) for seed in range(20)]
    assert len({question.message for question in asked}) == 20
    assert len({question.answer for question in asked}) == 20


def test_without_its_fact(text, tokenizer):
    question = ask_for_number(text, tokenizer, 0)
    blind = question.without_fact()
    assert question.answer not in blind.message
    assert len(blind.message) == len(question.message) - len(question.fact) - 1


@pytest.mark.parametrize(
    ("reply", "is_right"),
    [
        ("{}", True),
        ("The secret number of Alice is {}.", True),
        ("{:,}!", True),
        ("{}1", False),
        ("1{}", False),
        ("It is 12345, or {}.", False),
        ("", False),
        ("I do not know.", False),
    ],
)
def test_replies(text, tokenizer, reply, is_right):
    question = ask_for_number(text, tokenizer, 3)
    assert question.is_right(reply.format(int(question.answer))) == is_right


def test_books_that_will_not_do(tokenizer):
    with pytest.raises(ValueError, match=r"the book has \d+ tokens: it must have more than 1000"):
        ask_for_number("Short. " * 10, tokenizer, 0)
    with pytest.raises(ValueError, match="no sentence ends within"):
        ask_for_number("word " * 5000, tokenizer, 0)


@pytest.mark.parametrize("length", [1, 3, 40, 900])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 1, "num_sink_tokens": 0},
        {"window_size": 64, "max_separator_tokens": 3},
        {"window_size": 16, "max_separator_tokens": 1000, "num_sink_tokens": 20},
        {"policy": "streaming", "window_size": 64},
        {"policy": "fixed_interval", "interval": 5, "window_size": 64},
    ],
)
def test_tokens_attended_to_are_those_of_the_mask(book, tokenizer, options, length):
    config = SepLLMConfig.from_dict(options)
    ids = find_separators() if config.uses_separators else ()
    mask = sepllm_mask(
        book[:length],
        ids,
        config.num_sink_tokens,
        config.window_size,
        max_separators=config.max_separator_tokens,
        interval=config.interval,
    )
    assert num_attended(config, tokenizer, book[:length]) == int(np.asarray(mask)[-1].sum())


@pytest.mark.parametrize("length", [3, 900])
def test_tokens_attended_to_with_spans(book, tokenizer, length):
    options, after = usual_spans()
    config = SepLLMConfig.from_dict({**options, "window_size": 64})
    mask = sepllm_mask(book[:length], config.keep, 4, 64, after=after)
    assert num_attended(config, tokenizer, book[:length]) == int(np.asarray(mask)[-1].sum())


@pytest.mark.parametrize("bound", [None, 10])
def test_windows_of_equal_share(book, tokenizer, bound):
    config = SepLLMConfig(window_size=64, max_separator_tokens=bound, position_mode="cache")
    other = window_of_equal_share(config, tokenizer, book[:900])
    assert (other.policy, other.position_mode) == ("streaming", "cache")
    attended = num_attended(config, tokenizer, book[:900])
    assert num_attended(other, tokenizer, book[:900]) == attended < 900
