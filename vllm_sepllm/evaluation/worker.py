"""A process that evaluates one way of attending: ``python -m vllm_sepllm.evaluation.worker JOB``.

It prints one line for each thing done, so that who started it can show progress, and writes the
result beside the job in one step at the end.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_sepllm.evaluation.child import REASON
from vllm_sepllm.evaluation.material import Material, Question

DONE = "done"


def read_material(found: dict[str, Any]) -> Material:
    """The material of a JSON file."""

    def questions(rows: list[dict[str, Any]]) -> tuple[Question, ...]:
        return tuple(Question(**{**row, "token_ids": tuple(row["token_ids"])}) for row in rows)

    texts = tuple(map(tuple, found["texts"]))
    return Material(texts, questions(found["questions"]), questions(found["without"]))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a way. What has the same options is done by one engine."""
    from vllm_sepllm.engine.in_process import engine
    from vllm_sepllm.evaluation.measure import answer_questions, score_texts
    from vllm_sepllm.evaluation.ways import served

    material = read_material(json.loads(Path(job["material"]).read_text(encoding="utf8")))
    replies: dict[int, str] = {}
    held: list[dict[str, float]] = []
    result: dict[str, Any] = {}

    def done() -> None:
        print(DONE, flush=True)

    for options in distinct([job["of_texts"], *job["of_groups"].values()]):
        groups = {group for group, of in job["of_groups"].items() if of == options}
        chosen = {i: q for i, q in enumerate(material.questions) if q.group in groups}
        with engine(job["model"], served(options), **job["engine"]) as llm:
            if options == job["of_texts"]:
                result["texts"] = score_texts(llm, material.texts, done)
            if chosen:
                found = answer_questions(llm, chosen.values(), done)
                replies |= dict(zip(chosen, found["replies"], strict=True))
                held.append(found["held"])
            if chosen and job["guess"]:
                result["without"] = answer_questions(llm, material.without, done)
    return {"key": job["key"], **result, "questions": join(replies, held)}


def join(replies: dict[int, str], held: list[dict[str, float]]) -> dict[str, Any]:
    """Replies in the order of their questions, and what was held over all parts of them."""
    weights = [part["requests"] for part in held]
    of_all = {
        kind: sum(part[kind] * n for part, n in zip(held, weights, strict=True)) / sum(weights)
        for kind in held[0]
        if kind != "requests"
    }
    return {"replies": [replies[number] for number in sorted(replies)], "held": of_all}


def run_job(
    run: Callable[[dict[str, Any]], Any], sentence_of: Callable[[Exception], str] = str
) -> None:
    """Run the job of the file that the command line names, and write what comes of it.

    Args:
        run: to what is written as JSON.
        sentence_of: what an error says, for :func:`vllm_sepllm.evaluation.child.reason_in`.

    Raises:
        SystemExit: it failed; the reason is in the log.
    """
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf8"))
    try:
        found = run(job)
    except Exception as error:
        traceback.print_exception(error)
        reason = " ".join(sentence_of(error).split()) or type(error).__name__
        print(f"{REASON}{reason}", file=sys.stderr)
        raise SystemExit(1) from None
    write_json(Path(job["result"]), found)


def distinct(found: list[Any]) -> list[Any]:
    """Each once, in their order."""
    return [one for number, one in enumerate(found) if one not in found[:number]]


def set_environment() -> None:
    """What vLLM must find before it is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the log; progress is stdout


def main() -> None:
    """Run the job of a file."""

    def sentence(error: Exception) -> str:
        from vllm_sepllm.engine.in_process import sentence_of

        return sentence_of(error)

    set_environment()
    run_job(run, sentence)


def write_json(path: Path, found: Any) -> None:
    """Replaces what was there in one step, so that a file is never half of one."""
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(json.dumps(found) + "\n", encoding="utf8")
    partial.replace(path)


if __name__ == "__main__":
    main()
