"""Random traffic over a pool that is too small, checked after every step.

    python tests/soak.py --minutes 10 [--seed 0] [--check-share 0.1]

Requests arrive at random, share prefixes, are of 1 to 30,000 tokens, get aborted in every phase
and preempt each other. After each step every page must be free or held as often as it is
referenced; a share of the answers is compared with the Hugging Face reference, and at the end all
pages must be back. Ends with status 1 and the seed at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import conftest  # sets the environment before vLLM is imported
from helpers import Engine, book_tokens, find_separators

from vllm_sepllm.reference import first_difference

assert conftest
SINKS = 4
SHORT, LONG = 2048, 30_000  # tokens of the longest requests
CHECKED = 4096  # of longer answers one is compared in each engine's life: it takes a minute


class Soak:
    """One engine under random traffic of requests of up to ``max_len`` tokens."""

    def __init__(
        self, rng: random.Random, check_share: float, reference: Any, max_len: int = SHORT
    ) -> None:
        self.rng, self.check_share, self.reference = rng, check_share, reference
        self.max_len, self.longest_compared = max_len, 0
        self.window = rng.choice([3, 16, 64, 100, 256])
        book = book_tokens()
        self.book, self.separators = book * (1 + max_len // len(book)), find_separators()
        block_size = rng.choice([16, 32, 64])
        options: dict[str, Any] = {
            "block_size": block_size,
            "max_num_batched_tokens": rng.choice([64, 200, 512]),
            "max_num_seqs": rng.choice([3, 8, 16]),
            "num_gpu_blocks_override": self._room() // block_size + rng.choice([2, 20, 80]),
            "max_model_len": max_len,
            # The tables of rotary embeddings are as long; what the model makes of it is no matter.
            "hf_overrides": {"max_position_embeddings": max_len},
            "enable_prefix_caching": rng.random() < 0.8,
            "scheduler_reserve_full_isl": rng.random() < 0.5,
            "scheduling_policy": rng.choice(["fcfs", "priority"]),
        }
        sepllm = {"window_size": self.window, "num_sink_tokens": SINKS}
        print(f"window {self.window}, {options}", flush=True)
        self.engine = Engine(sepllm=sepllm, **options)
        self.counts: Counter[str] = Counter()
        self.prompts: dict[str, list[int]] = {}
        self.preempted: set[tuple[str, int]] = set()

    def _room(self) -> int:
        """Tokens' worth of blocks: all separators of the longest short request, or little more
        than the longest long one of ordinary text keeps."""
        return self.max_len if self.max_len == SHORT else int(0.22 * self.max_len)

    def prompt(self) -> list[int]:
        """A piece of the book behind one of a few shared beginnings, or separators only."""
        most = self.max_len - 120
        if self.rng.random() < 0.05:
            return [self.rng.choice(self.separators)] * self.rng.randint(1, most)
        stem = self.book[: self.rng.choice([0, 0, 33, 200, 640, 1200])]
        if self.max_len > SHORT and self.rng.random() < 0.2:
            length = self.rng.randint(SHORT, most)
        else:
            length = int(self.rng.expovariate(1 / 250) + 1)
        start = self.rng.randrange(0, 9000)
        return (stem + self.book[start : start + length])[:most]

    def arrive(self) -> None:
        from vllm import SamplingParams

        name = f"r{self.counts['arrived']}"
        self.counts["arrived"] += 1
        self.prompts[name] = self.prompt()
        params = SamplingParams(
            max_tokens=self.rng.choice([1, 5, 30, 100]), temperature=0, ignore_eos=True
        )
        prompt = {"prompt_token_ids": self.prompts[name]}
        engine = self.engine.llm.llm_engine
        engine.add_request(name, prompt, params, priority=self.rng.randint(0, 2))

    def step(self) -> None:
        for output in self.engine.step():
            if not output.finished:
                continue
            prompt, answer = self.prompts.pop(output.request_id), output.outputs[0]
            self.counts[answer.finish_reason] += 1
            self.counts["cached tokens"] += output.num_cached_tokens or 0
            if answer.finish_reason == "length" and self._is_compared(len(prompt)):
                self.counts["compared"] += 1
                self.longest_compared = max(self.longest_compared, len(prompt))
                wrong = first_difference(
                    self.reference, prompt, answer.token_ids, self.separators, SINKS, self.window
                )
                assert wrong is None, f"prompt of {len(prompt)} tokens: {wrong}"
        self.engine.check_integrity()
        live = self.engine.scheduler.requests.values()
        self.preempted |= {(r.request_id, n) for r in live for n in range(r.num_preemptions)}
        self.counts["steps"] += 1

    def _is_compared(self, length: int) -> bool:
        if length <= CHECKED:
            return self.rng.random() < self.check_share
        return length > self.max_len // 2 and self.longest_compared <= CHECKED

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Traffic for as long as ``goes_on()`` is true, then until all requests have ended."""
        while goes_on():
            if len(self.prompts) < 40 and self.rng.random() < 0.3:
                self.arrive()
            if self.prompts and self.rng.random() < 0.02:
                name = self.rng.choice(list(self.prompts))
                self.engine.abort([name])
                del self.prompts[name]
                self.counts["aborted"] += 1
            self.step()
        while self.engine.llm.llm_engine.has_unfinished_requests():
            self.step()
        pool = self.engine.pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pages were left behind"
        assert not self.prompts, "requests were lost"
        self.counts["preemptions"] = len(self.preempted)
        print(f"{dict(self.counts)}, longest compared {self.longest_compared}", flush=True)
        self.engine.close()


def main() -> None:
    import torch
    from helpers import MODEL
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--check-share", type=float, default=0.1)
    args = parser.parse_args()
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    end, seed = time.monotonic() + 60 * args.minutes, args.seed
    while time.monotonic() < end:
        print(f"seed {seed}: ", end="", flush=True)
        try:
            max_len = LONG if seed % 2 else SHORT
            soak = Soak(random.Random(seed), args.check_share, reference, max_len)
            stop = min(time.monotonic() + 60, end)
            soak.run(lambda stop=stop: time.monotonic() < stop)  # type: ignore[misc]
        except AssertionError as error:
            sys.exit(f"wrong with --seed {seed}: {error}")
        seed += 1
    print("nothing wrong")


if __name__ == "__main__":
    main()
