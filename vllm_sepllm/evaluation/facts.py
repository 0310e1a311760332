"""Facts of three kinds in one document, and whether a model can still tell them.

A document is a piece of a book with sentences about made-up people in it: a number, a name and a
word at each of several distances. The model is asked for one of them, and its answer is begun for
it with the sentence itself, up to what is asked for. So a small model, too, only has to look.

What stands in a document follows from a seed, so every way of attending gets the same.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

NAMES = (
    *("Alice", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas"),
    *("Karin", "Louis", "Maria", "Nadia", "Oscar", "Paula", "Robin", "Sofia", "Tomas", "Vera"),
)
SENTENCE_END = re.compile(r"[.?!][\"'\u201d\u2019]?\s|[\u3002\uff01\uff1f\u061f\u0964]")
READ_ON = "I have read this. Please go on."
DISTANCES = 300, 1000, 2000, 3500  # tokens of the book behind a fact, give or take a sentence
SPREAD = 60  # facts of one distance stand this many tokens apart at most
_LONGEST_SENTENCE = 1000  # characters; a book has such
_SOME_DAY = datetime(2024, 7, 26)
_BEFORE = 120  # tokens of the book before the first fact


@dataclass(frozen=True)
class Wording:
    """How a fact is said.

    Attributes:
        sentence: with ``{who}``, and ``{what}`` behind it.
        question: with ``{who}``.
        answers: what ``{what}`` may be; none for a number.
    """

    sentence: str
    question: str
    answers: tuple[str, ...] = ()


_CITIES = ("Paris", "Rome", "Vienna", "Madrid", "Dublin", "Prague", "Athens", "Lisbon", "Berlin")
_LANDS = ("France", "Italy", "Spain", "Russia", "Egypt", "India", "China", "Canada", "Norway")
_SHIPS = ("Juno", "Atlas", "Phoenix", "Mercury", "Neptune", "Apollo", "Titan", "Saturn", "Orion")
_MASTERS = ("Watson", "Baker", "Fisher", "Cooper", "Turner", "Carter", "Mason", "Parker", "Porter")
_COLOURS = ("yellow", "purple", "orange", "green", "brown", "crimson", "silver", "black", "golden")
_ANIMALS = (
    "parrot",
    "rabbit",
    "donkey",
    "tortoise",
    "goat",
    "monkey",
    "pigeon",
    "kitten",
    "spider",
)
_TOOLS = ("violin", "trumpet", "piano", "drum", "guitar", "flute", "banjo", "harp", "organ")
_FOODS = ("cheese", "honey", "onions", "cherries", "pepper", "ginger", "walnuts", "sausages")
# As many of a kind as distances: within a document no two facts are said alike.
WORDINGS = {
    "number": (
        Wording("The secret number of {who} is {what}.", "What is the secret number of {who}?"),
        Wording("{who} paid {what} dollars for the house.", "What did {who} pay for the house?"),
        Wording("The telephone number of {who} is {what}.", "What is {who}'s telephone number?"),
        Wording(
            "The ticket that {who} bought has the number {what}.",
            "Which number has the ticket that {who} bought?",
        ),
    ),
    "name": (
        Wording("{who} was born in the city of {what}.", "Where was {who} born?", _CITIES),
        Wording(
            "The ship on which {who} travels is called {what}.",
            "What is the ship called on which {who} travels?",
            _SHIPS,
        ),
        Wording("{who} works for Mr. {what}.", "For whom does {who} work?", _MASTERS),
        Wording(
            "The uncle of {who} lives in {what}.", "Where does the uncle of {who} live?", _LANDS
        ),
    ),
    "word": (
        Wording(
            "The favourite colour of {who} is {what}.",
            "What is the favourite colour of {who}?",
            _COLOURS,
        ),
        Wording("{who} has a {what} as a pet.", "Which animal does {who} have?", _ANIMALS),
        Wording(
            "The instrument that {who} plays is the {what}.",
            "Which instrument does {who} play?",
            _TOOLS,
        ),
        Wording("{who} likes to eat bread with {what}.", "What does {who} eat bread with?", _FOODS),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One sentence of a document.

    Attributes:
        kind: ``"number"``, ``"name"`` or ``"word"``.
        distance: one of ``DISTANCES``.
        sentence: as it stands in the document.
        question: that it answers.
        answer: the number, the name or the word.
    """

    kind: str
    distance: int
    sentence: str
    question: str
    answer: str

    @property
    def beginning(self) -> str:
        """The sentence up to the answer, without the space before it."""
        return self.sentence[: self.sentence.rindex(self.answer)].rstrip()

    def is_right(self, reply: str) -> bool:
        """Whether a reply, which goes on from :attr:`beginning`, begins with the answer."""
        return is_right(reply, self.answer)


def is_right(reply: str, answer: str) -> bool:
    """Whether a reply begins with the answer."""
    return re.match(rf"\s*{re.escape(answer)}(?!\w)", reply) is not None


@dataclass(frozen=True)
class Document:
    """A piece of a book with facts in it.

    Attributes:
        text: with their sentences.
        facts: in their order in the text.
    """

    text: str
    facts: tuple[Fact, ...]

    def without_facts(self) -> Document:
        """The same without their sentences: what is right then was guessed."""
        text = self.text
        for fact in self.facts:
            text = text.replace(f"{fact.sentence} ", "", 1)
        return Document(text, self.facts)

    def prompt(self, tokenizer: Any, fact: Fact) -> list[int]:
        """Token ids that ask for a fact of the document, the answer begun."""
        ids = chat_ids(tokenizer, f"{self.text}\n\nQuestion: {fact.question}")
        return ids + _begun(tokenizer, fact)

    def chat(self, tokenizer: Any, fact: Fact, num_turns: int) -> list[int]:
        """The same, the text having come in pieces over several turns of a conversation."""
        ends = [0, *(match.end() for match in SENTENCE_END.finditer(self.text))]
        wanted = [len(self.text) * turn // num_turns for turn in range(num_turns)]
        cuts = [_place(self.text, ends, at) for at in wanted] + [len(self.text)]
        messages = []
        for start, stop in pairwise(cuts):
            messages += [self.text[start:stop].strip(), READ_ON]
        ids = chat_ids(tokenizer, *messages, f"Question: {fact.question}")
        return ids + _begun(tokenizer, fact)


def hide_facts(
    book_ids: Sequence[int], tokenizer: Any, seed: int, distances: Sequence[int] = DISTANCES
) -> Document:
    """A document of a book, with a fact of each kind at each distance from its end.

    Args:
        book_ids: the book in tokens.
        tokenizer: one of Transformers.
        seed: decides which piece, people, wordings and answers.
        distances: tokens, each at least ``SPREAD`` from the next; at most four.

    Raises:
        ValueError: the book is too short.
    """
    rng = random.Random(seed)
    length = max(distances) + SPREAD + _BEFORE
    if len(book_ids) <= length:
        raise ValueError(f"the book has {len(book_ids)} tokens: it must have more than {length}")
    start = rng.randrange(len(book_ids) - length)
    stop = start + length
    people = rng.sample(NAMES, len(distances) * len(WORDINGS))
    wordings = {kind: rng.sample(said, len(said)) for kind, said in WORDINGS.items()}
    places = [(d + rng.randint(0, SPREAD), d, kind) for d in distances for kind in WORDINGS]
    book = tokenizer.decode(book_ids[start:stop])
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(book))]
    text, facts, done = "", [], 0
    for behind, distance, kind in sorted(places, reverse=True):
        facts.append(_make_fact(rng, kind, distance, wordings[kind].pop(), people.pop()))
        before = len(tokenizer.decode(book_ids[start : stop - behind]))
        cut = max(done, _place(book, ends, before))
        text += f"{book[done:cut]}{facts[-1].sentence} "
        done = cut
    return Document(text + book[done:], tuple(facts))


def _place(text: str, ends: Sequence[int], wanted: int) -> int:
    """Where a sentence can stand: the last end of one before a place, if it is near.

    In code, tables and the like there may be none; then the last white space, or the place itself.
    """
    end = ends[bisect_right(ends, wanted) - 1]
    if end and wanted - end <= _LONGEST_SENTENCE:
        return end
    space = max(text.rfind(" ", 0, wanted), text.rfind("\n", 0, wanted)) + 1
    return space if wanted - space <= _LONGEST_SENTENCE else wanted


def _make_fact(rng: random.Random, kind: str, distance: int, wording: Wording, who: str) -> Fact:
    what = rng.choice(wording.answers) if wording.answers else str(rng.randrange(1000, 100_000))
    sentence = wording.sentence.format(who=who, what=what)
    return Fact(kind, distance, sentence, wording.question.format(who=who), what)


def _begun(tokenizer: Any, fact: Fact) -> list[int]:
    ids: list[int] = tokenizer.encode(fact.beginning, add_special_tokens=False)
    return ids


def chat_ids(tokenizer: Any, *messages: str) -> list[int]:
    """Token ids of a chat, up to where the model answers.

    A model without a chat template was not trained on chats; it gets one written as a text.

    Args:
        tokenizer: one of Transformers.
        messages: the user's and the model's in turn; the last is the user's.

    Raises:
        ValueError: its template does not take such a chat.
    """
    roles = ("user", "assistant") * len(messages)
    chat = [
        {"role": role, "content": content} for role, content in zip(roles, messages, strict=False)
    ]
    if not tokenizer.chat_template:
        with suppress(Exception):  # mistral-common writes chats without a template
            return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))
        said = [
            f"{('Answer: ' if turn % 2 else '')}{text}\n\n" for turn, text in enumerate(messages)
        ]
        found: list[int] = tokenizer.encode("".join(said) + "Answer:")
        return found
    try:
        text = tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=True,
            tokenize=False,
            strftime_now=lambda form: _SOME_DAY.strftime(form),  # templates put today's date in
        )
    except Exception as error:  # a template may raise anything
        raise ValueError(
            f"the model's chat template takes no conversation ({error}): mend it, or remove it "
            "from the tokenizer, and chats are written as texts"
        ) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
