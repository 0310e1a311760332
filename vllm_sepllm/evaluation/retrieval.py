"""Questions for a fact that stands in a book, some way in front of the question.

A fact that lies behind the window can only be answered from what is kept of its sentence. What is
asked follows from a seed, so every way of attending gets the same questions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

NAMES = (
    *("Alice", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas"),
    *("Karin", "Louis", "Maria", "Nadia", "Oscar", "Paula", "Robin", "Sofia", "Tomas", "Vera"),
)
DISTANCES = 300, 850  # tokens between fact and question: behind the window, within the document
LENGTH = 1000  # tokens of the document
SENTENCE_END = re.compile(r"[.?!][\"'\u201d\u2019]?\s")


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        message: document and question, as a user's chat message.
        answer: what is to be found in it.
        fact: the sentence that says so.
        distance: tokens of the book between fact and question.
    """

    message: str
    answer: str
    fact: str
    distance: int

    def is_right(self, reply: str) -> bool:
        """Whether the first number of a reply is the answer; commas within numbers are ignored."""
        return re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d)", "", reply))[:1] == [self.answer]

    def without_fact(self) -> Question:
        """The same with nothing to be found: nobody can know the answer."""
        return Question(
            self.message.replace(f"{self.fact} ", "", 1), self.answer, self.fact, self.distance
        )


def ask_for_number(
    book: str,
    tokenizer: Any,
    seed: int,
    length: int = LENGTH,
    distances: tuple[int, int] = DISTANCES,
) -> Question:
    """A document cut out of ``book`` with a person's secret number in it, and the question for it.

    Args:
        book: text of more than ``length`` tokens.
        tokenizer: one of Transformers; it counts tokens.
        seed: decides document, person, number, and where the fact stands.
        length: tokens of the document, within a sentence.
        distances: least and greatest number of its tokens behind the fact, within a sentence.

    Raises:
        ValueError: the book is too short, or has no sentence to stand behind.
    """
    rng = random.Random(seed)
    ids = tokenizer.encode(book, add_special_tokens=False)
    if len(ids) <= length:
        raise ValueError(f"the book has {len(ids)} tokens: it must have more than {length}")
    start = rng.randrange(len(ids) - length)
    behind = rng.randint(*distances)
    name, number = rng.choice(NAMES), str(rng.randrange(10_000, 100_000))
    cut = start + length - behind
    before, after = tokenizer.decode(ids[start:cut]), tokenizer.decode(ids[cut : start + length])
    ends = [match.end() for match in SENTENCE_END.finditer(before)]
    if not ends:
        raise ValueError(f"no sentence ends within {length - behind} tokens of the book")
    before, rest = before[: ends[-1]], before[ends[-1] :]
    after = rest + after
    fact = f"The secret number of {name} is {number}."
    asked = f"Question: What is the secret number of {name}? Answer:"
    message = f"{before}{fact} {after}\n\n{asked}"
    distance = len(tokenizer.encode(after, add_special_tokens=False))
    return Question(message, number, fact, distance)


def chat_ids(tokenizer: Any, *messages: str) -> list[int]:
    """Token ids of a chat, up to where the model answers.

    Args:
        tokenizer: one of Transformers, with a chat template.
        messages: the user's and the model's in turn; the last is the user's.
    """
    roles = ("user", "assistant") * len(messages)
    chat = [
        {"role": role, "content": content} for role, content in zip(roles, messages, strict=False)
    ]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
