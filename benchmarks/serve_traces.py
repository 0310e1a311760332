"""Requests of the serving benchmark, of the repository's own texts.

Never random token ids: hardly any of them is a separator, which no real text is like, and SepLLM
would look better than it is. Requests come in parts of other text each, one for each rate: a server
with SepLLM remembers where requests resumed, even when its prefix cache has been emptied. The same
part is the same requests for every server.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ("5396", "22424", "35205")
FRONT_MATTER = 1_000  # tokens of a book before its first sentence, at most
PROBLEMS = ROOT / "examples/lm_eval/gsm8k_test.jsonl"
DIALOGUE = ROOT / "benchmarks/data/dialogue.txt"
QUESTIONS = (
    "Who is named in this passage?",
    "Where does it take place?",
    "What happens first, and what happens last?",
    "Who speaks, and what do they want?",
    "Which things are described, and how?",
    "What would you ask the author?",
    "Tell it again in two sentences.",
    "What is likely to happen next, and why?",
)
READ_TOKENS, TOLD_TOKENS = 180, 120  # of a book, in a turn of a conversation about it


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens are generated behind it, whatever they are."""

    prompt: str
    output_tokens: int


@dataclass(frozen=True)
class Documents:
    """Long passages of books, each with several questions, in random order.

    The questions of a passage share it as their prefix.
    """

    count: int
    tokens: int
    questions: int
    output_tokens: int
    name = "documents"

    def requests(self, tokenizer: Tokenizer, part: int = 0) -> list[Request]:
        found = []
        for passage in pieces(tokenizer, [self.tokens] * self.count, part):
            for question in QUESTIONS[: self.questions]:
                prompt = f"{passage}\n\nQuestion: {question}\nAnswer:"
                found.append(Request(prompt, self.output_tokens))
        random.Random(part).shuffle(found)
        return found


@dataclass(frozen=True)
class Chat:
    """Conversations that begin with the same example and grow, in rounds: everyone's first turn,
    then everyone's second.

    Half are about school problems, half read a book. The answers of former turns are those of the
    text, so that every server sees the same prompts.
    """

    users: int
    turns: int
    output_tokens: int
    name = "chat"

    def requests(self, tokenizer: Tokenizer, part: int = 0) -> list[Request]:
        rng = random.Random(part)
        reading = (self.users + 1) // 2
        read = pieces(tokenizer, [READ_TOKENS, TOLD_TOKENS] * (reading * self.turns), part)
        users: list[list[tuple[str, str]]] = []
        for user in range(self.users):
            if user % 2:
                users.append(
                    [(p["question"], p["answer"]) for p in rng.sample(problems(), self.turns)]
                )
            else:
                users.append([(next(read), next(read)) for _ in range(self.turns)])
        history = [DIALOGUE.read_text(encoding="utf8")] * self.users
        found = []
        for turn in range(self.turns):
            for user in range(self.users):
                question, answer = users[user][turn]
                prompt = f"{history[user]}\nUser: {question}\nAssistant:"
                found.append(Request(prompt, self.output_tokens))
                history[user] = f"{prompt} {answer}"
        return found


@dataclass(frozen=True)
class Short:
    """School problems, each on its own: little to leave out, and no pressure on memory."""

    count: int
    output_tokens: int
    name = "short"

    def requests(self, tokenizer: Tokenizer, part: int = 0) -> list[Request]:
        given = problems()
        random.Random(part).shuffle(given)
        # The numbers make them different where they repeat.
        return [
            Request(f"Problem {i + 1}. {problem['question']}\nAnswer:", self.output_tokens)
            for i, problem in zip(
                range(part * self.count, (part + 1) * self.count), cycle(given), strict=False
            )
        ]


Trace = Documents | Chat | Short


def problems() -> list[dict[str, str]]:
    """School problems with their answers."""
    return [json.loads(line) for line in PROBLEMS.read_text(encoding="utf8").splitlines()]


def pieces(tokenizer: Tokenizer, lengths: list[int], part: int = 0) -> Iterator[str]:
    """Consecutive texts of so many tokens each, of one book after the other.

    Args:
        part: that many times the same lengths are left out before.

    Raises:
        ValueError: the books are shorter than that.
    """
    books, position = book_tokens(tokenizer), FRONT_MATTER
    text, offsets = next(books)
    for i, length in enumerate(lengths * (part + 1)):
        while position + length > len(offsets):
            text, offsets = next(books, ("", []))
            if not text:
                raise ValueError(
                    f"the books are too short for part {part} of {sum(lengths):,} tokens"
                )
            position = FRONT_MATTER
        if i >= part * len(lengths):
            yield text[offsets[position][0] : offsets[position + length - 1][1]].strip()
        position += length


def book_tokens(tokenizer: Tokenizer) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Each book's text, and where its tokens begin and end there."""
    for book in BOOKS:
        data = (ROOT / f"benchmarks/data/{book}.txt.gz").read_bytes()
        text = gzip.decompress(data).decode("utf8")
        yield text, tokenizer.encode(text, add_special_tokens=False).offsets


def write_requests(path: Path, requests: list[Request]) -> None:
    """As ``vllm bench serve --dataset-name custom`` reads them."""
    lines = [
        json.dumps({"prompt": request.prompt, "output_tokens": request.output_tokens})
        for request in requests
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
