"""Conversations of many users, replayed against vLLM's scheduler to count what the cache serves.

Every user starts with the same system prompt and takes several turns; half of them read a book
aloud in turns, half ask school problems. Answers are given by the trace, so every engine sees
the same prompts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from helpers import ROOT, book_tokens, tokenizer
from simulation import NextToken, Simulation
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

BLOCK_SIZE = 32
MAX_LEN = 4096  # the simulated model has no positions to run out of
# What separators keep of English prose, with the margin that start-up adds to an estimate. Its own
# is of the sample text of which they keep most, JSON, and would compare with twice the memory.
PLANNED_KEPT_SHARE = 1.25 * 31 / 235
PROBLEMS = ROOT / "tests/data/gsm8k_train_64.jsonl"
Turn = tuple[list[int], list[int]]


@dataclass(frozen=True)
class ChatTrace:
    """A system prompt, and per user the question and the answer of each turn, as token ids."""

    system: list[int]
    users: list[list[Turn]]

    @classmethod
    def make(cls, num_users: int = 32, num_turns: int = 8, seed: int = 0) -> ChatTrace:
        rng, book = random.Random(seed), book_tokens()
        problems = [json.loads(line) for line in PROBLEMS.read_text("utf8").splitlines()]
        solved = [
            (encode(f"Question: {p['question']}\nAnswer: "), encode(f"{p['answer']}\n\n"))
            for p in problems
        ]
        system = [token for pair in solved[:4] for part in pair for token in part]
        users: list[list[Turn]] = []
        for user in range(num_users):
            if user % 2:
                users.append(rng.sample(solved[4:], num_turns))
                continue
            position, turns = rng.randrange(len(book) - 450 * num_turns), []
            for _ in range(num_turns):
                middle = position + rng.randint(40, 250)
                end = middle + rng.randint(40, 200)
                turns.append((book[position:middle], book[middle:end]))
                position = end
            users.append(turns)
        return cls(system, users)

    def __len__(self) -> int:
        """Tokens of all conversations at their ends."""
        turns = [turn for user in self.users for turn in user]
        text = sum(len(question) + len(answer) for question, answer in turns)
        return len(self.system) * len(self.users) + text


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text, add_special_tokens=False).input_ids
    return ids


def simulation_of(
    sepllm: dict[str, Any] | None, next_token: NextToken, num_blocks: int
) -> Simulation:
    """The scheduler that traces are sent to; see :class:`Simulation`."""
    if sepllm is not None:
        sepllm = {"planned_kept_share": PLANNED_KEPT_SHARE, **sepllm}
    return Simulation(
        sepllm,
        next_token,
        num_blocks=num_blocks,
        max_model_len=MAX_LEN,
        hf_overrides={"max_position_embeddings": MAX_LEN},
        max_num_batched_tokens=512,
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
    )


class Replay:
    """A trace on its way through a scheduler."""

    def __init__(
        self, trace: ChatTrace, sepllm: dict[str, Any] | None, num_blocks: int, seed: int = 1
    ) -> None:
        self._trace, self._rng = trace, random.Random(seed)
        self._answers: dict[str, tuple[int, list[int]]] = {}
        self._history = [list(trace.system) for _ in trace.users]
        self.simulation = simulation_of(sepllm, self._next_token, num_blocks)

    def _next_token(self, name: str, position: int, identity: int) -> int:
        start, answer = self._answers[name]
        return answer[position - start]

    @property
    def capacity(self) -> float:
        """Requests of ``MAX_LEN`` tokens at once, as vLLM logs at start-up."""
        simulation = self.simulation
        return get_max_concurrency_for_kv_cache_config(
            simulation.config, simulation.kv_cache_config
        )

    def run(self) -> float:
        """Share of all prompts' tokens that the prefix cache served."""
        simulation, prompts = self.simulation, {}
        # Arrivals by step; after an answer the user thinks for a while.
        due = {user: self._rng.randint(0, 200) for user in range(len(self._trace.users))}
        turn, waiting, step = dict.fromkeys(due, 0), {}, 0
        while due or waiting:
            for user in [user for user, at in due.items() if at <= step]:
                del due[user]
                name = f"user {user} turn {turn[user]}"
                question, answer = self._trace.users[user][turn[user]]
                prompt = self._history[user] + question
                self._answers[name], prompts[name] = (len(prompt), answer), len(prompt)
                self._history[user] = prompt + answer
                simulation.add(name, prompt, len(answer))
                waiting[name] = user
            if simulation.scheduler.has_unfinished_requests():
                simulation.step()
            for name in [name for name in waiting if name in simulation.finished]:
                assert simulation.finished[name] == "length"
                user = waiting.pop(name)
                turn[user] += 1
                if turn[user] < len(self._trace.users[user]):
                    due[user] = step + self._rng.randint(20, 400)
            step += 1
        simulation.check()
        return sum(simulation.cached.values()) / sum(prompts.values())
