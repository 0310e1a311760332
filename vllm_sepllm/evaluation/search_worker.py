"""A process that measures one set of options after another, as it is asked on standard input.

``python -m vllm_sepllm.evaluation.search_worker JOB``: each line is a JSON object with ``options``,
``texts`` and ``documents`` (numbers of the material); each answer is a line behind ``ANSWER``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm_sepllm.evaluation.material import Material
from vllm_sepllm.evaluation.worker import read_material, set_environment

ANSWER = "answer: "


def measure(job: dict[str, Any], material: Material, asked: dict[str, Any]) -> dict[str, Any]:
    """Nats of texts and replies of documents, each by its number."""
    from vllm_sepllm.engine.in_process import engine
    from vllm_sepllm.evaluation.measure import answer_questions, score_texts
    from vllm_sepllm.evaluation.ways import served

    def done() -> None:
        pass

    with engine(job["model"], served(asked["options"]), **job["engine"]) as llm:
        texts = {
            number: score_texts(llm, [material.texts[number]], done)["nats"][0]
            for number in asked["texts"]
        }
        documents = {
            number: answer_questions(llm, material.about(number), done)["replies"]
            for number in asked["documents"]
        }
    return {"texts": texts, "documents": documents}


def main() -> None:
    """Answer until there is no more input."""
    set_environment()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf8"))
    material = read_material(json.loads(Path(job["material"]).read_text(encoding="utf8")))
    for line in sys.stdin:
        try:
            found = measure(job, material, json.loads(line))
        except Exception as error:  # these options cannot be served; the next may
            from vllm_sepllm.engine.in_process import sentence_of

            found = {"error": " ".join(sentence_of(error).split())}
        print(ANSWER + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
