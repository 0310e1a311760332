"""What is evaluated: pieces of texts, and questions about facts that were put into them.

Everything is made once, as token ids, so that every way of attending gets the same.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from typing import Any

from vllm_sepllm.evaluation.facts import SPREAD, WORDINGS, Document, hide_facts

DEPTHS = 0.3, 0.65, 1.0  # of the distance that the first fact can have from a document's end
DOCUMENT, CHAT = "document", "chat"
NEW_TOKENS = 8  # of an answer
_BESIDE = 380  # tokens of a document that are not behind its first fact: those before it, and facts
_ROOM = 200  # tokens of a request beside its document: chat marks, the question, the answer begun
_LONGEST_TURN = 400  # tokens of a document in one turn of a conversation
_MARKS = 30  # tokens of a turn beside its text


@dataclass(frozen=True)
class Suite:
    """How much is evaluated.

    Attributes:
        num_texts: pieces whose second halves are predicted.
        text_length: of each, tokens.
        lengths: of documents with facts, tokens.
        num_documents: of each length.
        num_chats: conversations of the greatest length.
        more_ways: windows and keep classes beside the usual ones.
    """

    num_texts: int
    text_length: int
    lengths: tuple[int, ...]
    num_documents: int
    num_chats: int
    more_ways: bool = False

    def within(self, max_length: int) -> Suite:
        """The same, with texts no longer than a model's context.

        Raises:
            ValueError: nothing is left.
        """
        lengths = tuple(n for n in self.lengths if self._request(n) <= max_length)
        if not lengths:
            least = self._request(min(self.lengths))
            raise ValueError(
                f"the model's context of {max_length} tokens is too short: the shortest request "
                f"takes {least}"
            )
        text_length = min(self.text_length, max_length - NEW_TOKENS)
        return replace(self, lengths=lengths, text_length=text_length)

    def _request(self, length: int) -> int:
        """Tokens of a question about a document, at most."""
        turns = length // _LONGEST_TURN + 2 if self.num_chats else 0
        return length + _ROOM + turns * _MARKS + NEW_TOKENS

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(self.text_length + NEW_TOKENS, *map(self._request, self.lengths))


SUITES = {
    "quick": Suite(2, 1024, (700, 1400), 1, 1),
    "full": Suite(12, 4096, (1000, 2000, 4000, 7000), 5, 8, more_ways=True),
}


@dataclass(frozen=True)
class Question:
    """One question about one fact.

    Attributes:
        setting: ``DOCUMENT`` or ``CHAT``.
        document: number of its document; questions about one share most of their tokens.
        length: of the document, about so many tokens.
        distance: of the fact from the document's end, tokens, give or take a sentence.
        kind: of the fact.
        answer: the right one.
        token_ids: document and question, the answer begun.
    """

    setting: str
    document: int
    length: int
    distance: int
    kind: str
    answer: str
    token_ids: tuple[int, ...]

    @property
    def group(self) -> str:
        """Of questions that are as long."""
        return f"{self.setting} {self.length}"


@dataclass(frozen=True)
class Material:
    """Everything that a way of attending is asked.

    Attributes:
        texts: token ids of pieces.
        questions: those of a document are neighbours.
        without: the same questions about documents without the facts; what is right was guessed.
    """

    texts: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]
    without: tuple[Question, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with its answer."""
        asked = [question.token_ids for question in (*self.questions, *self.without)]
        return max(map(len, [*self.texts, *asked])) + NEW_TOKENS

    @property
    def documents(self) -> list[tuple[int, ...]]:
        """Token ids of the first question about each document."""
        return [ids for group in self.groups.values() for ids in group]

    @cached_property
    def groups(self) -> dict[str, list[tuple[int, ...]]]:
        """The same by the group of the questions."""
        first: dict[int, Question] = {}
        for question in self.questions:
            first.setdefault(question.document, question)
        found: dict[str, list[tuple[int, ...]]] = {}
        for question in first.values():
            found.setdefault(question.group, []).append(question.token_ids)
        return found

    def about(self, document: int) -> list[Question]:
        """The questions about one document."""
        return [question for question in self.questions if question.document == document]

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal material."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def package_text() -> str:
    """A novel that comes with the package (Project Gutenberg 860)."""
    data = files("vllm_sepllm.evaluation").joinpath("books/860.txt.gz").read_bytes()
    return gzip.decompress(data).decode("utf8")


def make_material(
    tokenizer: Any, texts: Sequence[str], suite: Suite, first_document: int = 0
) -> Material:
    """Pieces and documents of texts.

    Args:
        tokenizer: one of Transformers.
        texts: at least one. Pieces are spread over all of them, documents come from them in turn.
        suite: how much.
        first_document: number of the first; others have other facts.

    Raises:
        ValueError: the texts are too short.
    """
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    pieces = _pieces(ids, suite.num_texts, suite.text_length)
    bos = [] if tokenizer.bos_token_id is None else tokenizer.encode("")[:1]
    questions: list[Question] = []
    without: list[Question] = []
    plan = [(length, DOCUMENT) for length in suite.lengths for _ in range(suite.num_documents)]
    plan += [(suite.lengths[-1], CHAT)] * suite.num_chats
    for number, (length, setting) in enumerate(plan, first_document):
        distances = [max(SPREAD, round(depth * (length - _BESIDE))) for depth in DEPTHS]
        document = hide_facts(ids[number % len(ids)], tokenizer, number, distances)
        asked = _ask(tokenizer, document, setting, number, length, distances)
        questions += asked
        if setting == DOCUMENT:
            without += _ask(tokenizer, document.without_facts(), setting, number, length, distances)
    texts_of = tuple(tuple((*bos, *piece)[: suite.text_length]) for piece in pieces)
    return Material(texts_of, tuple(questions), tuple(without))


def longest_request(suite: Suite, material: Material, max_length: int) -> int:
    """Tokens of the longest request: as planned, or more under a long chat template.

    Raises:
        ValueError: the model's context has fewer.
    """
    if material.longest > max_length:
        raise ValueError(
            f"a question takes {material.longest} tokens with this model's chat template, it "
            f"can have {max_length}: take a model with a longer context, or raise max_model_len"
        )
    return min(max_length, max(suite.longest, material.longest))


def joined(*parts: Material) -> Material:
    """Of several parts, whose documents have different numbers."""
    return Material(
        tuple(text for part in parts for text in part.texts),
        tuple(question for part in parts for question in part.questions),
        tuple(question for part in parts for question in part.without),
    )


def split(text: str, count: int) -> list[str]:
    """As many parts of a text, about as long, cut at white space where there is some."""
    cuts = [0]
    for part in range(1, count):
        at = len(text) * part // count
        space = max(text.rfind(" ", cuts[-1], at), text.rfind("\n", cuts[-1], at)) + 1
        cuts.append(space if space > cuts[-1] else at)
    return [text[start:stop] for start, stop in pairwise([*cuts, len(text)])]


def _pieces(books: Sequence[Sequence[int]], count: int, length: int) -> list[Sequence[int]]:
    """Pieces at equal distances over all books, none over the end of one."""
    places = [(book, at) for book in books for at in range(0, len(book) - length + 1, length)]
    if len(places) < count:
        found = sum(len(book) for book in books)
        raise ValueError(
            f"the texts have {found:,} tokens, which gives {len(places)} pieces of {length:,} "
            f"(none crosses the end of a text): give texts for {count}"
        )
    chosen = [places[index * len(places) // count] for index in range(count)]
    return [book[at : at + length] for book, at in chosen]


def _ask(
    tokenizer: Any,
    document: Document,
    setting: str,
    number: int,
    length: int,
    distances: Sequence[int],
) -> list[Question]:
    """A question for each fact of a document."""
    found = []
    for fact in document.facts:
        if setting == CHAT:
            ids = document.chat(tokenizer, fact, length // _LONGEST_TURN + 1)
        else:
            ids = document.prompt(tokenizer, fact)
        about = setting, number, length, fact.distance, fact.kind, fact.answer
        found.append(Question(*about, tuple(ids)))
    assert len(found) == len(distances) * len(WORDINGS)
    return found
