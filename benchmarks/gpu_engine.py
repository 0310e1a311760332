"""vLLM on a GPU, end to end: SepLLM beside vLLM's own attention backends.

    python benchmarks/gpu_engine.py check RESULTS
    python benchmarks/gpu_engine.py measure RESULTS --model llama-3-8b --backend SEPLLM --kv auto
    python benchmarks/gpu_engine.py table RESULTS

`scripts/gpu_e2e.sh` runs all of it. `check` compares greedy tokens with a Hugging Face model under
the explicit mask, in float32. `measure` runs one engine in its own process: weights are random,
prompts are a PG19 book, and what models of that size generate from random weights holds next to no
separators. It notes each workload when it is done, and leaves out those that are. With `--engines 3
--kv-gib 20`, three that are started at once wait for each other and then take turns, which saves
the time of two starts. `table` puts what is there side by side.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import argparse
import fcntl
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("flashinfer") is None:  # vLLM takes it for granted on a GPU
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import shapes
import torch
from record import ROOT, provenance, write
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig

DEMO_MODEL = ROOT / "examples/models/pg19-5m-sep"
DEMO_BOOK = ROOT / "examples/data/860.txt"
SEPLLM = "SEPLLM"
DENSE = "dense"  # vLLM's own choice, for a machine without a GPU
# What vLLM does beside attention; from the usual setting to what works with any torch.
MODES: dict[str, dict[str, Any]] = {
    "compiled": {},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "eager": {"enforce_eager": True},
}


@dataclass(frozen=True)
class Workload:
    """Requests that come at once; the median of so many runs counts."""

    name: str
    prompt_tokens: int
    output_tokens: int
    requests: int
    runs: int = 1


@dataclass(frozen=True)
class Model:
    """A shape, what it is asked, and the largest batch."""

    config: PretrainedConfig
    workloads: tuple[Workload, ...]

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, rounded up."""
        longest = max(w.prompt_tokens + w.output_tokens for w in self.workloads)
        return -(-longest // 1024) * 1024


def llama(**sizes: Any) -> LlamaConfig:
    """Llama-3-8B, unless ``sizes`` say otherwise."""
    usual = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    }
    return LlamaConfig(**{**usual, **sizes}, tie_word_embeddings=False)


def pythia(**sizes: Any) -> GPTNeoXConfig:
    """Pythia-6.9B with more positions than it was trained on, unless ``sizes`` say otherwise."""
    usual = {
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50432,
        "max_position_embeddings": 36864,
        "rotary_pct": 0.25,
    }
    return GPTNeoXConfig(**{**usual, **sizes})


SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 50304}
MODELS = {
    "llama-3-8b": Model(
        llama(),
        (
            Workload("1K in, 256 out", 1024, 256, 64, runs=3),
            Workload("32K in, 1K out, 8 at once", 32768, 1024, 8),
        ),
    ),
    "llama-3-8b-crowded": Model(llama(), (Workload("32K in, 1K out", 32768, 1024, 64),)),
    "pythia-6.9b": Model(
        pythia(),
        (
            Workload("1K in, 256 out", 1024, 256, 64),
            Workload("32K in, 256 out", 32768, 256, 16),
        ),
    ),
    "smoke": Model(
        llama(**SMALL, num_attention_heads=4, num_key_value_heads=2),
        (Workload("smoke", 300, 8, 3), Workload("smoke, again", 300, 8, 3, runs=2)),
    ),
}


def options(backend: str, mode: str, model: str) -> dict[str, Any]:
    """Arguments of ``LLM`` for one backend; a tiny model takes little of a GPU."""
    chosen: dict[str, Any] = dict(MODES[mode])
    if backend == SEPLLM:
        chosen["additional_config"] = {"sepllm": {"window_size": shapes.WINDOW}}
    if backend != DENSE:
        chosen["attention_backend"] = backend
    if torch.cuda.is_available():
        chosen["gpu_memory_utilization"] = 0.1 if model == "smoke" else 0.9
    else:
        chosen |= {"kv_cache_memory_bytes": 64 << 20, "block_size": shapes.BLOCK_SIZE}
    return chosen


def check(mode: str) -> dict[str, Any]:
    """Greedy tokens of the demo model, cold and with a prefix from the cache, are the reference's.

    Raises:
        SystemExit: they differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    from vllm_sepllm.config import SepLLMConfig
    from vllm_sepllm.oracle.dense_mask import first_difference
    from vllm_sepllm.separators import resolve_separators

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = DEMO_BOOK.read_text(encoding="utf8")[2000:40000]
    book = tokenizer(text, add_special_tokens=False).input_ids
    window, sinks = 64, 4
    chosen = options(SEPLLM, mode, "smoke")
    chosen |= {"additional_config": {"sepllm": {"window_size": window, "num_sink_tokens": sinks}}}
    chosen |= {"kv_cache_memory_bytes": 256 << 20}
    llm = LLM(
        str(DEMO_MODEL),
        **chosen,
        dtype="float32",
        max_model_len=2048,
        max_num_batched_tokens=256,
        max_num_seqs=8,  # few graphs to capture
    )
    prompts = [book[:1658], book[100:102], book[3000:3542], book[:1200] + book[5000:5100]]
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    reference = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    separators = resolve_separators(SepLLMConfig(), tokenizer).token_ids
    found = {"prompts": 0, "cached_tokens": 0}
    for _ in range(2):  # the second time from the prefix cache
        for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params):
            prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            difference = first_difference(reference, prompt, answer, separators, sinks, window)
            if difference:
                raise SystemExit(f"check: prompt of {len(prompt)} tokens, {difference}")
            found["prompts"] += 1
            found["cached_tokens"] += output.num_cached_tokens
    return found


class Watch:
    """The most requests that ran at once and pages in use, from the scheduler's own figures."""

    def __init__(self, llm: Any) -> None:
        manager = llm.llm_engine.logger_manager
        self._record = manager.record
        manager.record = self.record
        self.reset()

    def reset(self) -> None:
        self.running, self.usage = 0, 0.0

    def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            self.running = max(self.running, scheduler_stats.num_running_reqs)
            self.usage = max(self.usage, scheduler_stats.kv_cache_usage)
        self._record(scheduler_stats, *args, **kwargs)


def empty_prefix_cache(llm: Any) -> None:
    """Prompts of another workload begin alike.

    Raises:
        RuntimeError: it stays in use.
    """
    for _ in range(50):  # the last step may still be under way
        if llm.reset_prefix_cache():
            return
        time.sleep(0.1)
    raise RuntimeError("the prefix cache is in use: times would be of less than all prompts")


def run_workload(llm: Any, watch: Watch, load: Workload, book: list[int]) -> dict[str, Any]:
    """The run of a workload with the middle rate, and the rates of all."""
    runs = [run_once(llm, watch, load, book) for _ in range(load.runs)]
    runs.sort(key=lambda row: row["output_tokens_per_second"])
    return {**runs[len(runs) // 2], "rates": [row["output_tokens_per_second"] for row in runs]}


def run_once(llm: Any, watch: Watch, load: Workload, book: list[int]) -> dict[str, Any]:
    """One run, with nothing in the prefix cache; times in seconds."""
    from vllm import SamplingParams

    empty_prefix_cache(llm)
    longer = book * (1 + (load.prompt_tokens + 997 * load.requests) // len(book))
    starts = [997 * i for i in range(load.requests)]  # no prompt is the beginning of another
    prompts = [{"prompt_token_ids": longer[s : s + load.prompt_tokens]} for s in starts]
    params = SamplingParams(max_tokens=load.output_tokens, temperature=0, ignore_eos=True)
    watch.reset()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    stats = [output.metrics for output in outputs]
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    decoding = [s.last_token_ts - s.first_token_ts for s in stats]
    steps = load.output_tokens - 1
    return {
        **asdict(load),
        "seconds": elapsed,
        "output_tokens_per_second": generated / elapsed,
        "time_to_first_token": statistics.median(s.first_token_latency for s in stats),
        "inter_token_latency": statistics.median(span / steps for span in decoding),
        "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "preemptions": sum(s.num_preemptions for s in stats),
        "running_at_most": watch.running,
        "kv_usage_at_most": watch.usage,
    }


@contextmanager
def own_turn(results: Path, engines: int) -> Iterator[None]:
    """Alone on the GPU among engines that are started at the same time, once all have started.

    Raises:
        RuntimeError: the others did not start within five minutes.
    """
    started = results / "started"
    started.mkdir(exist_ok=True)
    own = started / str(os.getpid())
    own.touch()
    try:
        for _ in range(3000):
            if sum(is_alive(int(path.name)) for path in started.iterdir()) >= engines:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"not all of {engines} engines have started")
        with (results / "turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    finally:
        own.unlink()


def is_alive(process: int) -> bool:
    """Whether a process runs: what a killed one left behind does not count."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def measure(args: argparse.Namespace) -> None:
    """The workloads of one model on one engine that are not measured yet."""
    about = {"model": args.model, "backend": args.backend, "kv": args.kv, "mode": args.mode}
    path = args.results / f"run-{args.model}-{args.backend}-{args.kv}.json"
    found: dict[str, Any] = {"is_complete": False, "workloads": []}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf8"))
    done = {load["name"] for load in found["workloads"]}
    asked = MODELS[args.model].workloads[: args.workloads]
    left = [load for load in asked if load.name not in done]
    from vllm import LLM

    model = MODELS[args.model]
    tokenizer = Tokenizer.from_str(shapes.read_gzip(shapes.TOKENIZER))
    book = tokenizer.encode(shapes.read_gzip(shapes.BOOK)).ids
    requests = max(load.requests for load in model.workloads)
    # Always the same folder: vLLM keeps compiled code by its name.
    folder = args.results / "models" / args.model
    shapes.write_model(folder, tokenizer, model.config)
    start = time.perf_counter()
    chosen = options(args.backend, args.mode, args.model)
    if args.kv_gib:
        chosen["kv_cache_memory_bytes"] = int(args.kv_gib * 2**30)
        chosen["gpu_memory_utilization"] = 0.9 / args.engines
    llm = LLM(
        str(folder),
        **chosen,
        load_format="dummy",
        dtype="bfloat16",
        kv_cache_dtype=args.kv,
        max_model_len=model.max_len,
        max_num_seqs=requests,
        disable_log_stats=False,
        seed=0,
    )
    watch = Watch(llm)
    about |= {**environment(), "seconds_to_start": time.perf_counter() - start}
    about |= {"blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks}
    about |= {"kv_gib": args.kv_gib, "engines_started_at_once": args.engines}
    with own_turn(args.results, args.engines):
        warm_up = Workload("warm-up", 300, 4, min(requests, 8))
        run_workload(llm, watch, warm_up, book[::-1])
        for load in left:
            found["workloads"].append({**about, **run_workload(llm, watch, load, book)})
            measured = {load["name"] for load in found["workloads"]}
            found["is_complete"] = all(load.name in measured for load in model.workloads)
            write(path, found)


def environment() -> dict[str, Any]:
    """Where and with what it ran."""
    import vllm

    found = provenance("torch", "triton")
    found["versions"]["vllm"] = vllm.__version__
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def load_runs(results: Path) -> list[dict[str, Any]]:
    """One row per model, workload, backend and type of the cache.

    ``sepllm_ratio`` is SepLLM's output rate over this row's, where both were measured.
    """
    rows = []
    for path in sorted(results.glob("run-*.json")):
        rows += json.loads(path.read_text(encoding="utf8"))["workloads"]
    ours = {case(row): row for row in rows if row["backend"] == SEPLLM}
    for row in rows:
        rate = ours.get(case(row), {}).get("output_tokens_per_second")
        row["sepllm_ratio"] = rate and rate / row["output_tokens_per_second"]
    return sorted(rows, key=lambda row: (*case(row), row["backend"]))


def case(row: dict[str, Any]) -> tuple[str, str, str]:
    """What backends are compared on."""
    return row["model"], row["name"], row["kv"]


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table("model", "workload", "KV", "backend")
    for name in (
        "tokens/s",
        "SepLLM ratio",
        "TTFT, s",
        "ITL, ms",
        "at once",
        "KV use",
        "preempted",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = row["sepllm_ratio"]
        table.add_row(
            row["model"],
            row["name"],
            row["kv"],
            row["backend"],
            f"{row['output_tokens_per_second']:.1f}",
            f"{ratio:.2f}" if ratio else "-",
            f"{row['time_to_first_token']:.2f}",
            f"{1000 * row['inter_token_latency']:.2f}",
            str(row["running_at_most"]),
            f"{row['kv_usage_at_most']:.1%}",
            str(row["preemptions"]),
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("check", "measure", "table"))
    parser.add_argument("results", type=Path, help="folder of the results")
    parser.add_argument("--mode", choices=MODES, default="compiled")
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--backend", default=SEPLLM)
    parser.add_argument("--kv", default="auto", help="vLLM's kv_cache_dtype")
    parser.add_argument("--workloads", type=int, help="only the first so many")
    parser.add_argument("--kv-gib", type=float, help="memory for the KV cache, GiB")
    parser.add_argument("--engines", type=int, default=1, help="so many wait for each other")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.action == "check":
        found = {**environment(), "mode": args.mode, **check(args.mode)}
        write(args.results / f"check-{args.mode}.json", found)
        print(f"check: {found['prompts']} answers equal the reference's ({args.mode})")
    elif args.action == "measure":
        measure(args)
    else:
        checks = [json.loads(p.read_text()) for p in sorted(args.results.glob("check-*.json"))]
        rows = load_runs(args.results)
        show(rows)
        found = {**environment(), "checks": checks, "results": rows}
        write(args.results / "gpu_e2e.json", found)


if __name__ == "__main__":
    main()
