"""Questions about documents, sent to vLLM's scheduler to count what the cache serves.

Each document is asked several questions, in random order among the others'. The questions of a
document share it as their prefix.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from chat_trace import BLOCK_SIZE, encode, simulation_of
from helpers import BOOK

FIRST_QUESTION = 3  # of them; any token is as good as another
MAX_GAP = 24  # steps between two requests, at most
NUM_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class DocumentTrace:
    """Documents as token ids, and questions: the document's number and what is asked."""

    documents: list[list[int]]
    questions: list[tuple[int, list[int]]]

    @classmethod
    def make(
        cls, num_documents: int = 12, num_tokens: int = 2400, num_questions: int = 6, seed: int = 0
    ) -> DocumentTrace:
        rng, book = random.Random(seed), encode(BOOK.read_text(encoding="utf8"))
        ends = range(num_tokens, num_tokens * num_documents + 1, num_tokens)
        documents = [book[end - num_tokens : end] for end in ends]
        assert len(documents[-1]) == num_tokens, "the book is too short"
        asked = [
            (document, rng.sample(range(FIRST_QUESTION, 2000), rng.randint(8, 25)))
            for document in range(num_documents)
            for _ in range(num_questions)
        ]
        rng.shuffle(asked)
        return cls(documents, asked)

    def __len__(self) -> int:
        """Tokens of all documents."""
        return sum(len(document) for document in self.documents)

    @property
    def most(self) -> float:
        """Share of all prompts' tokens that a cache without end would serve."""
        size, served, seen = BLOCK_SIZE, 0, set()
        for document, _ in self.questions:
            served += len(self.documents[document]) // size * size * (document in seen)
            seen.add(document)
        return served / sum(len(self.documents[d]) + len(asked) for d, asked in self.questions)

    def run(self, sepllm: dict[str, Any] | None, num_blocks: int, seed: int = 1) -> float:
        """Share of all prompts' tokens that the prefix cache served."""
        rng, at, due = random.Random(seed), 0, []
        for i, (document, asked) in enumerate(self.questions):
            due.append((at, f"question {i}", self.documents[document] + asked))
            at += rng.randint(0, MAX_GAP)
        simulation = simulation_of(
            sepllm,
            lambda name, position, identity: FIRST_QUESTION + (7919 * position + identity) % 2000,
            num_blocks,
        )
        step, num_tokens = 0, sum(len(prompt) for _, _, prompt in due)
        while due or simulation.scheduler.has_unfinished_requests():
            while due and due[0][0] <= step:
                _, name, prompt = due.pop(0)
                simulation.add(name, prompt, NUM_ANSWER_TOKENS)
            if simulation.scheduler.has_unfinished_requests():
                simulation.step()
            step += 1
        simulation.check()
        assert set(simulation.finished.values()) == {"length"}
        return sum(simulation.cached.values()) / num_tokens
