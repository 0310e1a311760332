"""Share of tokens that separators keep, and the preset "facts", by kind of text and tokenizer.

    .venv/bin/python benchmarks/kept_share.py [TOKENIZER ...] [--json]

A tokenizer is a folder or a ``tokenizer.json``, which may end in ``.gz``. Without one, those of
this repository are taken. No model is run, and the same files give the same numbers. Prints a
table in Markdown for each tokenizer; ``docs/separators.md`` shows them.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.kept_ids import resolve_kept
from vllm_sepllm.planning import kept_share
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.samples import SAMPLES
from vllm_sepllm.separator_lists import LIST_OF_SAMPLE
from vllm_sepllm.separators import num_token_ids, resolve_separators

ROOT = Path(__file__).resolve().parent.parent
TOKENIZERS = ("examples/models/pg19-5m-sep", "tests/data/20B_tokenizer.json.gz")
PAGES = (
    "CONTRIBUTING.md",
    "docs/long-texts.md",
    "examples/ray_cluster.md",
    "kernels/README.md",
    "vllm_sepllm/engine/README.md",
)
RESULTS = ("cpu", "cpu_prefill", "needle", "prefix_cache", "stream")
SCRIPTS = ("Chinese", "Japanese", "Korean", "Arabic", "Hindi", "Thai", "Russian")
NONE = "–"  # noqa: RUF001 - where a column would repeat another


@dataclass(frozen=True)
class Text:
    """A kind of text.

    Attributes:
        kind: for people.
        own_list: the list of separators made for it; "default" is one.
        text: all of it.
    """

    kind: str
    own_list: str
    text: str


def texts() -> list[Text]:
    lines = _read("tests/data/gsm8k_train_64.jsonl").splitlines()
    problems = [f"{each['question']}\n{each['answer']}" for each in map(json.loads, lines)]
    return [
        Text("English book", "default", _read("examples/data/860.txt")),
        Text("news", "default", _read("benchmarks/data/news.txt")),
        Text("dialogue", "default", _read("benchmarks/data/dialogue.txt")),
        Text("school problems", "default", "\n\n".join(problems)),
        Text("Python code", "code", _all("vllm_sepllm", "*.py")),
        Text("JSON", "code", "".join(_read(f"benchmarks/results/{name}.json") for name in RESULTS)),
        Text("Markdown", "markdown", "".join(map(_read, PAGES))),
        *(Text(name, LIST_OF_SAMPLE[name], SAMPLES[name]) for name in SCRIPTS),
    ]


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _all(folder: str, pattern: str) -> str:
    return "".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob(pattern))
    )


def columns(own_list: str) -> dict[str, tuple[tuple[str, ...], str] | None]:
    """Separators and how they are matched, by heading; ``None`` where a text has no list."""
    own = None if own_list == "default" else ("default", own_list)
    return {
        "default": (("default",), "exact"),
        "+ list": own and (own, "exact"),
        "multilingual": (("multilingual",), "exact"),
        "default, composed": (("default",), "composed"),
        "+ list, composed": own and (own, "composed"),
    }


def load(path: str) -> Any:
    """The tokenizer in a folder or file.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    import transformers
    from tokenizers import Tokenizer

    transformers.logging.set_verbosity_error()
    place = ROOT / path if path in TOKENIZERS else Path(path).expanduser()
    try:
        if place.is_dir():
            return transformers.AutoTokenizer.from_pretrained(place)
        data = place.read_bytes()
        text = (gzip.decompress(data) if place.suffix == ".gz" else data).decode("utf-8")
        return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))
    except Exception as error:  # what is raised differs by version and by file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
        raise ValueError(
            f"tokenizer {path!r} cannot be loaded ({reason}): give a folder that holds a "
            "tokenizer, or a tokenizer.json"
        ) from error


def measure(tokenizer: Any, found: list[Text]) -> list[dict[str, Any]]:
    """A row for each text.

    Shares go from 0 to 1, and are ``None`` in a column that a text does not have. The count of
    tokens is left out of tables, as it follows every change of this repository's files.
    """
    rows = []
    vocab_size = num_token_ids(tokenizer)
    preset = SepLLMConfig.from_dict({"preset": "facts"})
    facts = KeepRule.of(resolve_kept(preset, tokenizer).resolve(preset), vocab_size)
    for each in found:
        ids = tokenizer.encode(each.text, add_special_tokens=False)
        row = {"text": each.kind, "list": each.own_list, "tokens": len(ids)}
        for heading, options in columns(each.own_list).items():
            row[heading] = options and kept_share(policy_of(tokenizer, vocab_size, *options), ids)
        row["facts"] = kept_share(facts, ids)
        rows.append(row)
    return rows


def policy_of(tokenizer: Any, vocab_size: int, separators: tuple[str, ...], match: str) -> KeepRule:
    """The policy with these separators, or with none if the tokenizer has no such tokens."""
    config = SepLLMConfig(separators=separators, separator_match=match)
    try:
        ids = resolve_separators(config, tokenizer).token_ids
    except ConfigError:
        ids = ()
    return KeepRule.of(config.with_kept_ids(ids), vocab_size)


def markdown(path: str, tokenizer: Any, rows: list[dict[str, Any]]) -> str:
    headings = [heading for heading in rows[0] if heading != "tokens"]
    lines = [
        f"`{path}` ({len(tokenizer):,} tokens), in %:",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|---|{'---:|' * (len(headings) - 2)}",
    ]
    lines += [f"| {' | '.join(_cell(row[heading]) for heading in headings)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{100 * value:.1f}"
    return value or NONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", nargs="*", default=TOKENIZERS, help="folder or tokenizer.json")
    parser.add_argument("--json", action="store_true", help="print JSON, shares from 0 to 1")
    arguments = parser.parse_args()
    found, tables, results = texts(), [], {}
    for path in arguments.tokenizer:
        try:
            tokenizer = load(path)
        except ValueError as error:
            parser.exit(2, f"kept_share.py: {error}\n")
        results[path] = measure(tokenizer, found)
        tables.append(markdown(path, tokenizer, results[path]))
    print(json.dumps(results, indent=1) if arguments.json else "\n\n".join(tables))


if __name__ == "__main__":
    main()
