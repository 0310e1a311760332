"""A process that evaluates one way of attending: ``python -m vllm_sepllm.evaluation.worker JOB``.

It prints one line for each thing done, so that who started it can show progress, and writes the
result beside the job in one step at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm_sepllm.evaluation.material import Material, Question

DONE = "done"


def read_material(found: dict[str, Any]) -> Material:
    """The material of a JSON file."""

    def questions(rows: list[dict[str, Any]]) -> tuple[Question, ...]:
        return tuple(Question(**{**row, "token_ids": tuple(row["token_ids"])}) for row in rows)

    texts = tuple(map(tuple, found["texts"]))
    return Material(texts, questions(found["questions"]), questions(found["without"]))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a way. Engines with the same options are one engine."""
    from vllm_sepllm.engine.in_process import engine
    from vllm_sepllm.evaluation.measure import answer_questions, score_texts

    material = read_material(json.loads(Path(job["material"]).read_text(encoding="utf8")))
    result: dict[str, Any] = {}

    def done() -> None:
        print(DONE, flush=True)

    of_texts, of_questions = job["of_texts"], job["of_questions"]
    for options in [of_texts] if of_texts == of_questions else [of_texts, of_questions]:
        with engine(job["model"], options, **job["engine"]) as llm:
            if options == of_texts:
                result["texts"] = score_texts(llm, material.texts, done)
            if options == of_questions:
                result["questions"] = answer_questions(llm, material.questions, done)
                if job["guess"]:
                    result["without"] = answer_questions(llm, material.without, done)
    return result


def set_environment() -> None:
    """What vLLM must find before it is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    """Run the job of a file."""
    set_environment()
    path = Path(sys.argv[1])
    job = json.loads(path.read_text(encoding="utf8"))
    write_json(Path(job["result"]), {"key": job["key"], **run(job)})


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Replaces what was there in one step, so that a file is never half of one."""
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(json.dumps(found) + "\n", encoding="utf8")
    partial.replace(path)


if __name__ == "__main__":
    main()
