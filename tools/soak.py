"""Random traffic over a pool that is too small, checked after every step.

    python tools/soak.py --minutes 10 [--seed 0] [--check-share 0.1]

Requests arrive at random, share prefixes, get aborted in every phase and preempt each other. Most
are short; engines with an odd seed also take some of up to 30,000 tokens. After each step every
page must be free or held as often as it is referenced, and at the end of an engine's life all pages
must be back. A share of the short answers is compared with the Hugging Face reference, and of the
long ones two per engine: the longest, and one that was preempted. Ends with status 1 and the seed
at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import environment  # before vLLM is imported
from helpers import (
    CacheReference,
    Engine,
    book_tokens,
    find_separators,
    page_bound,
    span_options,
)
from traffic import Traffic

from vllm_sepllm.oracle.dense_mask import KeptAfter, first_difference

assert environment
SINKS = 4
SHORT, LONG = 2048, 30_000  # tokens of the longest requests of an engine
LARGE_SHARE = 0.08  # of requests are longer than SHORT, where the engine takes them
CHECKED = 4096  # answers to longer prompts are compared after the traffic: one takes up to a minute
VERY_LONG = 16_384  # at least one answer to a longer prompt is compared
STEMS = [0, 0, 33, 200, 640, 1200, 12_000]  # shared tokens at the beginning of prompts
MAX_TOKENS = [1, 5, 30, 200]
MOST_KEPT = 0.18


class Soak(Traffic):
    """One engine under random traffic of requests of up to ``max_len`` tokens."""

    def __init__(
        self,
        rng: random.Random,
        check_share: float,
        reference: Any,
        max_len: int = SHORT,
        position_mode: str = "original",
    ) -> None:
        self.check_share, self.reference = check_share, reference
        self.max_len, self.longest_compared = max_len, 0
        self.window = rng.choice([3, 16, 64, 100, 256])
        self.bound = rng.choice([None, None, 2, 40])
        book = book_tokens()
        self.book, self.separators = book * (2 + max_len // len(book)), find_separators()
        block_size, chunk = rng.choice([16, 32, 64]), rng.choice([64, 200, 512])
        options: dict[str, Any] = {
            "block_size": block_size,
            "max_num_batched_tokens": chunk,
            "max_num_seqs": rng.choice([3, 8, 16]),
            "num_gpu_blocks_override": self._room(chunk, block_size) + rng.choice([2, 20, 80]),
            "max_model_len": max_len,
            # The tables of rotary embeddings are as long; what the model makes of it is no matter.
            "hf_overrides": {"max_position_embeddings": max_len},
            "enable_prefix_caching": rng.random() < 0.8,
            "scheduler_reserve_full_isl": rng.random() < 0.5,
            "scheduling_policy": rng.choice(["fcfs", "priority"]),
        }
        sepllm = {"window_size": self.window, "num_sink_tokens": SINKS}
        sepllm["planned_kept_share"] = MOST_KEPT  # of a book; samples of other texts keep more
        sepllm |= {"max_separator_tokens": self.bound, "position_mode": position_mode}
        self.position_mode = position_mode
        self.after: KeptAfter | None = None
        number = rng.choice([0, 0, 1, 3, 9])
        if number:  # behind some of the rarer separators, so that memory suffices
            by_count = sorted(self.separators, key=book.count)
            some = dict.fromkeys(by_count[2:5], number)
            given, self.after = span_options(some, by_count[-1:], self.separators)
            sepllm |= given
        print(f"window {self.window}, bound {self.bound}, spans {number}, {options}", flush=True)
        super().__init__(rng, Engine(sepllm=sepllm, **options))
        self.long_answers: dict[str, tuple[list[int], list[int]]] = {}

    def _room(self, chunk: int, block_size: int) -> int:
        """Blocks for all separators of the longest short request, or for the longest long one of
        ordinary text; with a bound, for what any request holds at most."""
        if self.bound is not None:
            kept = SINKS + block_size + self.bound + self.window + chunk + block_size
            return 1 + page_bound(kept, self.window, chunk, block_size)
        if self.max_len == SHORT:
            return SHORT // block_size
        kept = int(MOST_KEPT * self.max_len)
        return 1 + page_bound(kept, self.window, chunk, block_size)

    def length(self) -> int:
        """Tokens of a prompt: below ``SHORT`` and, for a few, above, longer ones more often."""
        low, high = (SHORT, self._most()) if self.rng.random() < LARGE_SHARE else (1, SHORT)
        return min(self._most(), int(low * (high / low) ** self.rng.random() ** 0.5))

    def _most(self) -> int:
        return self.max_len - max(MAX_TOKENS)

    def prompt(self, length: int) -> list[int]:
        """A piece of the book behind one of a few shared beginnings, or separators only."""
        if self.rng.random() < 0.05:
            return [self.rng.choice(self.separators)] * length
        stem, start = self.rng.choice(STEMS), self.rng.randrange(0, 9000)
        return (self.book[:stem] + self.book[start : start + length])[:length]

    def take(self, name: str, prompt: list[int], answer: list[int]) -> None:
        if len(prompt) > SHORT:
            self.counts["large"] += 1
        if len(prompt) > CHECKED:
            self.long_answers[name] = prompt, answer
        elif self.rng.random() < self.check_share:
            self._compare(prompt, answer)

    def _compare(self, prompt: list[int], answer: list[int]) -> None:
        self.counts["compared"] += 1
        self.longest_compared = max(self.longest_compared, len(prompt))
        mask = self.separators, SINKS, self.window
        if self.position_mode == "cache":
            reference = CacheReference(self.reference, *mask, self.bound, after=self.after)
            reference.check(prompt, answer)
            return
        kept = {"max_separators": self.bound, "after": self.after}
        wrong = first_difference(self.reference, prompt, answer, *mask, **kept)
        assert wrong is None, f"prompt of {len(prompt)} tokens: {wrong}"

    def _compare_long(self) -> None:
        """The longest answer, and one of the preempted."""
        names = sorted(self.long_answers, key=lambda name: len(self.long_answers[name][0]))
        preempted = sorted({name for name, _ in self.preempted} & set(names[:-1]))
        for name in names[-1:] + self.rng.sample(preempted, min(1, len(preempted))):
            self._compare(*self.long_answers[name])

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Traffic for as long as ``goes_on()`` is true, then until all requests have ended."""
        while goes_on():
            if len(self.prompts) < 40 and self.rng.random() < 0.3:
                self.arrive(self.prompt(self.length()), self.rng.choice(MAX_TOKENS))
            if self.prompts and self.rng.random() < 0.02:
                self.abort()
            self.step()
        lengths = [len(prompt) for prompt, _ in self.long_answers.values()]
        if self.max_len > VERY_LONG and max(lengths, default=0) <= VERY_LONG:
            # Nothing is aborted any more: there will be one to compare.
            prompt = self.book[: self.rng.randint(VERY_LONG + 1, self._most())]
            self.arrive(prompt, self.rng.choice(MAX_TOKENS))
        self.finish()
        self.counts["large preemptions"] = sum(n > SHORT for n in self.preempted.values())
        self._compare_long()
        print(f"{dict(self.counts)}, longest compared {self.longest_compared}", flush=True)


def main() -> None:
    import torch
    from helpers import MODEL
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--check-share", type=float, default=0.05)
    parser.add_argument("--position-mode", choices=["original", "cache"], default="original")
    args = parser.parse_args()
    # The reference in cache positions is too slow for long texts.
    longest_of = {"original": LONG, "cache": SHORT}[args.position_mode]
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    end, seed = time.monotonic() + 60 * args.minutes, args.seed
    totals: Counter[str] = Counter()
    longest = 0
    while time.monotonic() < end:
        print(f"seed {seed}: ", end="", flush=True)
        try:
            max_len = longest_of if seed % 2 else SHORT
            rng = random.Random(seed)
            soak = Soak(rng, args.check_share, reference, max_len, args.position_mode)
            stop = min(time.monotonic() + 60, end)
            soak.run(lambda stop=stop: time.monotonic() < stop)  # type: ignore[misc]
        except AssertionError as error:
            sys.exit(f"wrong with --seed {seed}: {error}")
        totals += soak.counts
        longest = max(longest, soak.longest_compared)
        seed += 1
    print(f"nothing wrong: {dict(totals)}, longest compared {longest}")


if __name__ == "__main__":
    main()
