"""Random engines under random traffic, every answer compared with the explicit mask.

    python tools/fuzz.py --minutes 10 [--seed 0]

Each engine has options drawn at random: block size, window, sinks, bound, spans, policy, positions,
dense layers, drafts, chunks, scheduling. Its pool is too small for its traffic, so requests preempt
each other; some are aborted, some share prefixes. Answers are compared with a Hugging Face model
under the explicit mask: all of them, or in cache positions, where that takes seconds, a third and
those that were preempted. After each step pages are compared with the pool. Ends with status 1 and
the seed at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from typing import Any

import environment  # before vLLM is imported
from helpers import NGRAM, CacheReference, Engine, Reference, book_tokens, find_separators
from traffic import Traffic

from vllm_sepllm.oracle.dense_mask import KeptAfter

assert environment
NUM_LAYERS, VOCABULARY = 6, 4096
TOKENS = {"original": 700, "cache": 300}  # of the longest requests; the reference is slow
MOST_TOKENS = 40  # of an answer
STEMS = [0, 0, 16, 40, 130, 256, 400]  # shared tokens at the beginning of prompts
STEPS = 120


def draw_rule(rng: random.Random) -> dict[str, Any]:
    """SepLLM options: what is kept, and where it seems to stand."""
    rule: dict[str, Any] = {
        "window_size": rng.choice([1, 2, 5, 16, 31, 32, 64, 100, 255, 256, 300]),
        "num_sink_tokens": rng.choice([0, 1, 3, 4, 17, 33]),
        "policy": rng.choice(["sepllm", "sepllm", "sepllm", "streaming", "fixed_interval"]),
    }
    if rule["policy"] == "fixed_interval":
        rule["interval"] = rng.choice([1, 2, 5, 33])
    if rule["policy"] == "sepllm":
        drawn = rng.choice([list(find_separators()), [], rng.sample(range(2, VOCABULARY), 1500)])
        if rng.random() < 0.3:
            rule["separator_token_ids"] = drawn
        else:
            rule["keep"] = drawn
            if drawn:
                rule |= draw_spans(rng, drawn)
        rule["planned_kept_share"] = 0.01  # pools are small on purpose
        rule["max_separator_tokens"] = rng.choice([None, None, 1, 6, 40])
    rule["position_mode"] = rng.choice(["original", "original", "cache"])
    if rule["position_mode"] == "original" and rng.random() < 0.3:
        rule["dense_layers"] = sorted(rng.sample(range(NUM_LAYERS), rng.randint(1, 3)))
    return rule


def draw_spans(rng: random.Random, kept: list[int]) -> dict[str, Any]:
    """Some kept tokens keep others behind themselves, up to tokens drawn or to full stops."""
    some = rng.sample(kept, rng.randint(1, min(3, len(kept))))
    longest = rng.choice([9, 9, 9, 32])
    pairs = [[rng.randint(0, longest), [token_id]] for token_id in some]
    pairs.append([rng.randint(0, 9), rng.choice([[], kept])])
    ends = rng.choice([[], rng.sample(range(2, VOCABULARY), 400), list(find_separators())[:3]])
    return {"keep_after": pairs, "segment_ends": ends}


def draw_options(rng: random.Random, rule: dict[str, Any]) -> dict[str, Any]:
    """vLLM's own options."""
    blocks = [32, 64, 96, 128] if rule.get("dense_layers") else [16, 32, 48, 64, 80, 128]
    most = TOKENS[rule["position_mode"]]
    options: dict[str, Any] = {
        "block_size": rng.choice(blocks),
        "max_model_len": most,
        "max_num_batched_tokens": rng.choice([48, 100, 256, 700]),
        "max_num_seqs": rng.choice([2, 5, 12]),
        "long_prefill_token_threshold": rng.choice([0, 0, 37]),
        "enable_prefix_caching": rng.random() < 0.8,
        "scheduler_reserve_full_isl": rng.random() < 0.5,
        "scheduling_policy": rng.choice(["fcfs", "priority"]),
    }
    if rng.random() < 0.3:
        options["speculative_config"] = NGRAM
    return options


def reference_spans(rule: dict[str, Any]) -> KeptAfter | None:
    """The oracle's word for :func:`draw_spans`."""
    if "keep_after" not in rule:
        return None
    num_tokens: dict[int, int] = {}
    for number, ids in rule["keep_after"]:
        for token_id in ids:
            num_tokens[token_id] = max(number, num_tokens.get(token_id, 0))
    return KeptAfter(num_tokens, frozenset(rule["segment_ends"]))


class Fuzz(Traffic):
    """One engine, drawn from ``rng``."""

    def __init__(self, rng: random.Random, model: Any) -> None:
        self.rng, self.rule = rng, draw_rule(rng)
        options = draw_options(rng, self.rule)
        of_ids = "separator_token_ids", "keep", "keep_after", "segment_ends"
        shown = {k: v for k, v in self.rule.items() if k not in of_ids}
        separators = next((self.rule[name] for name in of_ids[:2] if name in self.rule), ())
        spans = [[number, len(ids)] for number, ids in self.rule.get("keep_after", ())]
        print(f"{len(separators)} separators, spans {spans}, {shown}, {options}", flush=True)
        super().__init__(rng, self._start(options))
        self.most = options["max_model_len"]
        self.separators = list(separators) or [rng.randrange(2, VOCABULARY)]
        self.book = book_tokens()
        self.reference = self._make_reference(model, separators)

    def _start(self, options: dict[str, Any]) -> Engine:
        """With about the smallest pool that vLLM starts with for these options, or some more."""
        num_blocks = self.rng.choice([6, 20, 60])
        while True:
            try:
                engine = Engine(self.rule, **options, num_gpu_blocks_override=num_blocks)
            except ValueError as error:
                if "To serve at least one request" not in str(error):
                    raise
                num_blocks += 1 + num_blocks // 3
            else:
                print(f"{num_blocks} blocks", flush=True)
                return engine

    def _make_reference(self, model: Any, separators: Any) -> Reference:
        rule = self.rule
        mask = separators, rule["num_sink_tokens"], rule["window_size"]
        kept = {"bound": rule.get("max_separator_tokens"), "interval": rule.get("interval")}
        kept["after"] = reference_spans(rule)
        if rule["position_mode"] == "cache":
            return CacheReference(model, *mask, **kept)
        return Reference(model, *mask, **kept, dense_layers=rule.get("dense_layers", ()))

    def take(self, name: str, prompt: list[int], answer: list[int]) -> None:
        """Compare an answer with the reference's."""
        is_cheap = self.rule["position_mode"] == "original"
        if is_cheap or self.counts["length"] % 3 == 1 or (name, 0) in self.preempted:
            self.counts["compared"] += 1
            self.reference.check(prompt, answer)

    def prompt(self) -> list[int]:
        """A piece of the book behind a shared beginning, separators alone, or anything."""
        rng = self.rng
        length = rng.randint(1, self.most - MOST_TOKENS)
        kind = rng.random()
        if kind < 0.1:
            return [rng.choice(self.separators)] * length
        if kind < 0.2:
            return [rng.randrange(2, VOCABULARY) for _ in range(length)]
        stem, start = rng.choice(STEMS), rng.randrange(0, 9000)
        return (self.book[:stem] + self.book[start : start + length])[:length]

    def run(self, steps: int = STEPS) -> None:
        """Traffic for so many steps, then until all requests have ended."""
        for _ in range(steps):
            if len(self.prompts) < 16 and self.rng.random() < 0.4:
                self.arrive(self.prompt(), self.rng.randint(1, MOST_TOKENS))
            if self.prompts and self.rng.random() < 0.02:
                self.abort()
            if self.rng.random() < 0.005 and self.engine.llm.reset_prefix_cache():
                self.counts["cache resets"] += 1
            self.step()
        self.finish()
        print(dict(self.counts), flush=True)


def main() -> None:
    import torch
    from helpers import MODEL
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    end, seed = time.monotonic() + 60 * args.minutes, args.seed
    totals: Counter[str] = Counter()
    while time.monotonic() < end:
        print(f"seed {seed}: ", end="", flush=True)
        try:
            fuzz = Fuzz(random.Random(seed), model)
            fuzz.run()
        except AssertionError as error:
            sys.exit(f"wrong with --seed {seed}: {error}")
        totals += fuzz.counts
        totals["engines"] += 1
        seed += 1
    if not totals["preemptions"]:
        sys.exit("no request was preempted: the traffic was too easy")
    print(f"nothing wrong: {dict(totals)}")


if __name__ == "__main__":
    main()
