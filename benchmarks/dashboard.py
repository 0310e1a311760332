"""The dashboard of ``examples/grafana`` under load, as a picture.

    PYTHONPATH=tools .venv/bin/python benchmarks/dashboard.py [--output docs/dashboard.png]

A server with SepLLM gets three minutes of the serving benchmark's requests, and some that can
never fit. A Prometheus asks it once a second. Then each panel's queries are asked of Prometheus,
and the answers are drawn in the places that the dashboard gives them. Grafana draws the same
numbers in its own way. Needs Prometheus (Debian: ``apt install prometheus``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shapes
from prometheus import DASHBOARD, Prometheus, filled, panels
from serve_cases import Case, ways
from serve_process import Server
from serve_traces import Chat, Documents, Request, Short
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build/bench-serve/dashboard.log"
INTERVAL = "15s"  # of rates
REST_SECONDS = 10.0
# Requests of a phase, and how many are sent in a second: more than the KV cache has room for.
PHASES = (
    (Short(count=100, output_tokens=48), 8.0),
    (Documents(count=8, tokens=4000, questions=5, output_tokens=160), 3.0),
    (Chat(users=20, turns=6, output_tokens=64), 6.0),
)
CASE = Case(model=None, max_len=8192, kv_mib=20, window=256, traces=(), max_seqs=24)
TOO_LARGE = Request(".\n" * 3500, 8)  # nothing but separators


def send(server: Server, model: str, request: Request) -> None:
    body = {"model": model, "prompt": request.prompt, "max_tokens": request.output_tokens}
    data = json.dumps({**body, "ignore_eos": True, "temperature": 0}).encode()
    asked = urllib.request.Request(
        f"{server.url}/v1/completions", data, {"Content-Type": "application/json"}
    )
    with suppress(OSError):  # one that cannot fit is answered with an error
        urllib.request.urlopen(asked, timeout=600).read()


async def load(server: Server, model: str, tokenizer: Tokenizer) -> None:
    """All phases, one after the other."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(200) as threads:

        def start(request: Request) -> asyncio.Future[None]:
            return loop.run_in_executor(threads, send, server, model, request)

        for trace, rate in PHASES:
            sent = []
            for request in trace.requests(tokenizer):
                sent.append(start(request))
                await asyncio.sleep(1 / rate)
            sent += [start(TOO_LARGE) for _ in range(2)]
            await asyncio.gather(*sent)
            await asyncio.sleep(REST_SECONDS)


def measure() -> list[tuple[dict[str, Any], list[list[Any]]]]:
    """Each panel, and what Prometheus answers to each of its queries."""
    binary = shutil.which("prometheus")
    if binary is None:
        sys.exit("prometheus is not installed: apt install prometheus")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Tokenizer.from_str(shapes.read_gzip(shapes.TOKENIZER))
        shapes.write_model(folder / "llama", tokenizer, shapes.benchmark_model())
        options = CASE.options() + ways(False, CASE.window)["SEPLLM"]
        with Server(
            str(folder / "llama"), [*options, "--served-model-name", "llama"], LOG
        ) as server:
            prometheus = Prometheus(binary, folder, server.port)
            try:
                start = time.time()
                asyncio.run(load(server, "llama", tokenizer))
                span = {"start": start, "end": time.time(), "step": 1}
                return [(panel, _answers(prometheus, panel, span)) for panel in panels()]
            finally:
                prometheus.stop()


def _answers(prometheus: Prometheus, panel: dict[str, Any], span: dict[str, Any]) -> list[Any]:
    queries = [filled(target["expr"], INTERVAL) for target in panel["targets"]]
    return [prometheus.ask("query_range", query=query, **span)["result"] for query in queries]


def draw(measured: list[tuple[dict[str, Any], list[list[Any]]]], path: Path) -> None:
    """As many panels as the dashboard has, at their places."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted({panel["gridPos"]["y"] for panel, _ in measured})
    figure, axes = pyplot.subplots(
        len(rows), 3, figsize=(15, 3 * len(rows)), layout="constrained", squeeze=False
    )
    times = [
        float(t) for _, answers in measured for a in answers for r in a for t, _ in r["values"]
    ]
    start = min(times)
    for panel, answers in measured:
        place = panel["gridPos"]
        axis = axes[rows.index(place["y"])][place["x"] * 3 // 24]
        axis.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
        axis.tick_params(labelsize=8)
        if panel["type"] == "heatmap":
            _draw_shares(axis, answers[0], start)
        else:
            _draw_lines(axis, panel, answers, start)
        axis.set_xlim(0, max(times) - start)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=80)


def _draw_lines(axis: Any, panel: dict[str, Any], answers: list[list[Any]], start: float) -> None:
    is_stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    series = []
    for target, results in zip(panel["targets"], answers, strict=True):
        for result in results:
            label = target["legendFormat"]
            for name, value in result["metric"].items():
                label = label.replace("{{" + name + "}}", value)
            points = [(float(t) - start, float(v)) for t, v in result["values"]]
            series.append((label, [p for p in points if math.isfinite(p[1])]))
    if is_stacked:
        times = sorted({t for _, points in series for t, _ in points})
        values = [[dict(points).get(t, 0.0) for t in times] for _, points in series]
        axis.stackplot(times, values, labels=[label for label, _ in series], alpha=0.7)
    else:
        for label, points in series:
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
    if panel["fieldConfig"]["defaults"]["unit"] == "percentunit":
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.set_ylim(0, 1)
    else:
        axis.set_ylim(0, None)
    if panel["fieldConfig"]["defaults"]["unit"] == "s":
        axis.yaxis.set_major_formatter("{x:g} s")
    axis.legend(fontsize=7, loc="upper left")


def _draw_shares(axis: Any, results: list[Any], start: float) -> None:
    """Requests by the share of their tokens that was kept; buckets as they are reported."""
    bounds = sorted(float(result["metric"]["le"]) for result in results)
    bounds = [bound for bound in bounds if math.isfinite(bound)]
    below = {float(r["metric"]["le"]): dict(r["values"]) for r in results}
    times = sorted({float(t) for r in results for t, _ in r["values"]})
    grid, lower = [], dict.fromkeys(times, 0.0)
    for bound in bounds:
        upper = {float(t): float(v) for t, v in below[bound].items()}
        grid.append([max(0.0, upper.get(t, 0.0) - lower[t]) for t in times])
        lower = {t: upper.get(t, 0.0) for t in times}
    edges = [times[0] - start - 1, *(t - start for t in times)]
    axis.pcolormesh(edges, [0.0, *bounds], grid, cmap="Oranges")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.set_ylim(0, 0.65)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs/dashboard.png")
    given = parser.parse_args()
    measured = measure()
    draw(measured, given.output)
    print(f"{len(measured)} panels of {DASHBOARD.relative_to(ROOT)} drawn in {given.output}")


if __name__ == "__main__":
    main()
