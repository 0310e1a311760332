"""Most requests per second with SepLLM and with full attention, measured in turns.

    python benchmarks/serve_turns.py [--models llama] [--rounds 5] [--output FILE]

On a machine that others use, too, a server is now and then much slower for a minute. So here both
servers of ``benchmarks/serve.py`` run at the same time, one idle while the other answers, and each
round asks both for the same requests, all at once. What is compared are two neighbours in time.
Each round has text of its own and begins with empty prefix caches. What was measured is written at
once; a run that was stopped begins again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from serve import (
    ALL_AT_ONCE,
    MOST_RATES,
    ROOT,
    Bench,
    Results,
    about,
    available,
    end_servers_when_ended,
    gpu,
    log_of,
)
from serve_cases import CASES, Case, ways
from serve_process import Server, ServerError
from tokenizers import Tokenizer

OUTPUT = ROOT / "benchmarks/results/serve_turns.json"


def measure(bench: Bench, name: str, case: Case, rounds: int, device: str | None) -> None:
    """All traces of a model."""
    folder = bench.model_folder(case)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    given = ways(device is not None, case.window)
    with contextlib.ExitStack() as stack:
        servers = {}
        for way, options in given.items():
            begin = time.monotonic()
            server = Server(folder, case.options() + options, log_of("turns", name, way))
            servers[way] = stack.enter_context(server)
            bench.console.print(f"{name}, {way}: ready after {time.monotonic() - begin:.0f} s")
        for trace, _ in case.traces:
            for server in servers.values():
                bench.warm(server, folder, trace.requests(tokenizer)[:2])
            for turn in range(rounds):
                requests = trace.requests(tokenizer, turn)
                order = list(servers)[:: 1 if turn % 2 else -1]  # nobody is always the second
                for way in order:
                    point = bench.measure_point(servers[way], folder, requests, ALL_AT_ONCE)
                    point |= {"model": name, "way": way, "trace": trace.name, "round": turn}
                    bench.results.add(point)
                found = rates(bench.results.content["points"], name, trace.name)
                last = ", ".join(f"{way} {found[way][-1]:.2f}" for way in servers)
                bench.console.print(f"{trace.name:9} round {turn + 1}: {last} requests/s")


def rates(points: list[dict[str, Any]], model: str, trace: str) -> dict[str, list[float]]:
    """Requests per second of each way, by round."""
    found: dict[str, list[float]] = {}
    for point in points:
        if (point["model"], point["trace"]) == (model, trace):
            found.setdefault(point["way"], []).append(point["requests_per_second"])
    return found


def ratios(found: dict[str, list[float]]) -> list[float]:
    """Of the first way over the second, round by round."""
    first, second = list(found.values())[:2]
    return [a / b for a, b in zip(first, second, strict=True)]


def show(content: dict[str, Any], console: Console) -> None:
    """Medians over the rounds, and the lowest and the highest ratio of a round."""
    table = Table(title="requests per second, all at once, in turns")
    for column in ("model", "trace", "ways", "medians", "ratio, median", "lowest", "highest"):
        table.add_column(column)
    for model, settings in content["settings"].items():
        for trace in settings["traces"]:
            found = rates(content["points"], model, trace)
            found = {way: found[way] for way in settings["ways"] if way in found}
            if len(found) < 2:
                continue
            by_round = ratios(found)
            figures = (f"{x:.2f}" for x in (median(by_round), min(by_round), max(by_round)))
            medians = " / ".join(f"{median(each):.2f}" for each in found.values())
            table.add_row(model, trace, " / ".join(found), medians, *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, help="default: all that are there")
    parser.add_argument("--rounds", type=int, default=5, help=f"1 to {MOST_RATES + 1}; default: 5")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    if not 1 <= given.rounds <= MOST_RATES + 1:
        parser.error(f"--rounds {given.rounds}: there is text for 1 to {MOST_RATES + 1} rounds")
    console, device = Console(width=100, highlight=False), gpu()
    cases = {n: c for n, c in available(CASES, console).items() if n in (given.models or CASES)}
    described = about(cases, device) | {"command": "benchmarks/serve_turns.py"}
    results = Results(given.output, described | {"rounds": given.rounds}, is_fresh=True)
    end_servers_when_ended()
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(results, Path(folder), is_single=True, console=console)
            for name, case in cases.items():
                measure(bench, name, case, given.rounds, device)
        results.end()
    except (ServerError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "Stopped.")
    show(results.content, console)
    console.print(f"written to {given.output}")


if __name__ == "__main__":
    main()
