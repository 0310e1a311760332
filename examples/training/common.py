"""What the recipes share: a configuration file, texts in pieces, training that goes on where it
stopped, and perplexity of the second halves of texts."""

from __future__ import annotations

import argparse
import gzip
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, list[int]]]


def configuration(script: str) -> dict[str, Any]:
    """The TOML file of a recipe, changed by ``--set training.max_steps=10``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, default=Path(script).with_suffix(".toml"))
    parser.add_argument("--set", action="append", default=[], metavar="section.name=value")
    given = parser.parse_args()
    found: dict[str, Any] = tomllib.loads(given.config.read_text(encoding="utf8"))
    for change in given.set:
        place, _, value = change.partition("=")
        section, _, name = place.partition(".")
        if section not in found or not name or not value:
            parser.error(f"--set {change}: write section.name=value, sections: {', '.join(found)}")
        try:
            found[section][name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[section][name] = value  # a text without quotes
    return found


def read_text(path: str) -> str:
    """A file beside the repository's own, or anywhere; ``.gz`` is unpacked."""
    file = ROOT / path
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return data.decode("utf8")


def pieces(tokenizer: Any, paths: Sequence[str], length: int, most: int | None = None) -> Rows:
    """Texts in pieces of equal length; what is left at a text's end is not used."""
    rows: Rows = []
    for path in paths:
        ids = tokenizer(read_text(path), add_special_tokens=False)["input_ids"]
        parts = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        rows += [{"input_ids": part, "labels": part} for part in parts[:most]]
    if not rows:
        raise SystemExit(f"no text has {length} tokens: lower data.length, or add texts")
    return rows


def train(
    model: Any,
    rows: Rows,
    options: dict[str, Any],
    trainer: Callable[..., Any] = transformers.Trainer,
    **others: Any,
) -> Any:
    """Train with a progress bar; a checkpoint in ``output_dir`` is gone on from.

    Args:
        model: changed.
        rows: token ids and labels.
        options: of ``transformers.TrainingArguments``.
        trainer: a Trainer of transformers.
        others: more for it.
    """
    usual = {"report_to": [], "logging_steps": 10, "save_total_limit": 1, "seed": 0}
    usual["use_cpu"] = not torch.cuda.is_available()
    arguments = transformers.TrainingArguments(**{**usual, **options})
    made = trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.default_data_collator,
        **others,
    )
    folder = Path(arguments.output_dir)
    made.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return made


@torch.no_grad()
def perplexity(model: Any, rows: Rows) -> float:
    """Of the second half of each text, where the first has left the window."""
    was_training, nats, counted = model.training, 0.0, 0
    model.eval()
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        half = ids.shape[1] // 2
        logits = model(input_ids=ids, use_cache=False).logits[0, half - 1 : -1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, half:], reduction="sum"))
        counted += ids.shape[1] - half
    model.train(was_training)
    return math.exp(nats / counted)
