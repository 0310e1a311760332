"""What the recipes share: a configuration file, texts in pieces, training that goes on where it
stopped, and perplexity of the second halves of texts."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shlex
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import TrainerState
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
        *sections, name = place.split(".")
        table: Any = found
        for section in sections:
            table = table.get(section) if isinstance(table, dict) else None
        # These two are options of others, which check their names.
        is_open = sections in (["training"], ["sepllm"])
        if not sections or not value or table is None or not (is_open or name in table):
            parser.error(f"--set {change}: {given.config.name} has no {place}")
        try:
            table[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[name] = value  # a text without quotes
    return found


def claim(folder: Path, given: dict[str, Any]) -> None:
    """Note what a folder's checkpoints are of; another run does not go on from them.

    More steps, and how often something is saved or said, are no other run.
    """
    free = ("output_dir", "max_steps", "save_steps", "save_total_limit", "logging_steps")
    options = {name: value for name, value in given["training"].items() if name not in free}
    mine, note = {**given, "training": options}, folder / "recipe.json"
    is_other = note.exists() and json.loads(note.read_text(encoding="utf8")) != mine
    if is_other and any(folder.rglob("checkpoint-*")):
        raise SystemExit(
            f"{folder} has checkpoints of a run with other settings ({note.name} there has them): "
            "remove the folder, or set training.output_dir to another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(mine, indent=2), encoding="utf8")


def say_how_to_serve(model: Path, *options: str) -> None:
    """Print the line that serves a model, for a shell."""
    parts = ".venv/bin/vllm", "serve", str(model), *options
    print(f"\nServe it:\n{shlex.join(parts)}")


def one_of(place: str, value: str, *known: str) -> str:
    """A value of the configuration that has to be one of some."""
    if value not in known:
        raise SystemExit(f"{place}={value!r}: must be one of {', '.join(known)}")
    return value


class Seconds(transformers.TrainerCallback):  # type: ignore[misc]
    """Notes beside what is logged for how long was trained, over all sessions."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        del args, control, more
        noted = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self._began = time.monotonic() - max(noted, default=0.0)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        del args, control, more
        state.log_history[-1]["seconds"] = time.monotonic() - self._began


class TrainableWeights(transformers.TrainerCallback):  # type: ignore[misc]
    """Weights beside an adapter that are trained too: PEFT's checkpoints leave them out."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
        del control, more
        torch.save(self._beside(model), self._file(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
        del control, more
        if state.global_step:
            saved = torch.load(self._file(args, state), map_location="cpu")
            for name, weight in self._beside(model).items():
                weight.data.copy_(saved[name])

    @staticmethod
    def _beside(model: Any) -> dict[str, Any]:
        named = model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and "lora_" not in name}

    @staticmethod
    def _file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "beside_adapter.pt"


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

    What is trained to the end already is loaded, and not trained any more.

    Args:
        model: changed.
        rows: token ids and labels.
        options: of ``transformers.TrainingArguments``.
        trainer: a Trainer of transformers.
        others: more for it.

    Returns:
        The Trainer; its ``state`` has what was logged, and the model is trained.
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
    made.add_callback(Seconds())
    folder = Path(arguments.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    done = None if last is None else final_state(folder, Path(last))
    if done is not None and 0 < arguments.max_steps <= done.global_step:
        made.state = done  # Trainer would go one step further
        made._load_from_checkpoint(last)
        for callback in others.get("callbacks", ()):
            callback.on_train_begin(arguments, done, made.control, model=model)
        return made
    made.train(resume_from_checkpoint=last)
    made.save_state()
    return made


def final_state(folder: Path, checkpoint: Path) -> TrainerState:
    """Of the last checkpoint; that of a training's end, if it was reached, has its last lines."""
    states = [
        TrainerState.load_from_json(str(each / "trainer_state.json"))
        for each in (folder, checkpoint)
        if (each / "trainer_state.json").exists()
    ]
    return max(states, key=lambda state: state.global_step)


@torch.no_grad()
def likeliest(model: Any, rows: Rows) -> tuple[float, list[torch.Tensor]]:
    """Of the second half of each text, where the first has left the window: perplexity, and the
    likeliest token at each place."""
    was_training, nats, found = model.training, 0.0, []
    model.eval()
    forward = getattr(model, "_original_forward", model)  # without the Trainer's autocast
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        half = ids.shape[1] // 2
        logits = forward(input_ids=ids, use_cache=False).logits[0, half - 1 : -1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, half:], reduction="sum"))
        found.append(logits.argmax(-1).cpu())
    model.train(was_training)
    return math.exp(nats / sum(len(tokens) for tokens in found)), found


def perplexity(model: Any, rows: Rows) -> float:
    """Of the second half of each text."""
    return likeliest(model, rows)[0]
