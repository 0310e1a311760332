"""What the recipes share: a configuration file, texts in pieces, training that goes on where it
stopped, and perplexity of the second halves of texts."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shlex
import shutil
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import TrainerState

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, list[int]]]
FORMAT = 2  # of what runs leave; 1 had texts without their first token, and counted none


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
        table[name] = value_of(value)
    return found


def value_of(text: str) -> Any:
    """A value as TOML or Python writes it; what is neither is a text without quotes."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def claim(folder: Path, given: dict[str, Any]) -> None:
    """Note what a folder's checkpoints are of; another run does not go on from them.

    More steps, and how often something is saved or said, are no other run.
    """
    free = ("output_dir", "max_steps", "save_steps", "save_total_limit", "logging_steps")
    options = {name: value for name, value in given["training"].items() if name not in free}
    mine, note = {"format": FORMAT, **given, "training": options}, folder / "recipe.json"
    is_other = note.exists() and json.loads(note.read_text(encoding="utf8")) != mine
    if is_other and any(folder.rglob("checkpoint-*")):
        raise SystemExit(
            f"{folder} has checkpoints of a run with other settings ({note.name} there has them): "
            "remove the folder, or set training.output_dir to another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    whole = note.with_suffix(".new")  # a run may be stopped while it writes
    whole.write_text(json.dumps(mine, indent=2), encoding="utf8")
    os.replace(whole, note)


def model_at(place: str, path: str) -> str:
    """A model's folder, or its name on a hub; folders are seen from the repository's."""
    if (ROOT / path).is_dir():
        return str(ROOT / path)
    if path.count("/") == 1 and path[0] not in "./~":
        return path
    raise SystemExit(
        f"{place}={path!r}: {ROOT / path} is no folder; name one, seen from the repository's own "
        "or absolute, or OWNER/NAME of the hub (make model fetches SmolLM2)"
    )


def say_how_to_serve(model: Path | str, *options: str) -> None:
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


class TrainerBesideAdapter(transformers.Trainer):  # type: ignore[misc]
    """Saves and loads weights beside an adapter that are trained too: PEFT leaves them out."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        torch.save(self._beside(), self._file(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = torch.load(self._file(resume_from_checkpoint), map_location="cpu")
        for name, weight in self._beside().items():
            weight.data.copy_(saved[name])

    def _beside(self) -> dict[str, Any]:
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and "lora_" not in name}

    @staticmethod
    def _file(folder: str) -> Path:
        return Path(folder) / "beside_adapter.pt"


def read_text(path: str) -> str:
    """A file, its path seen from the repository's folder; ``.gz`` is unpacked."""
    file = ROOT / path
    if not file.is_file():
        raise SystemExit(
            f"{file} is no file: texts are named from the repository's own folder, or by absolute "
            "paths"
        )
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return data.decode("utf8")


def pieces(
    tokenizer: Any, paths: Sequence[str] | str, length: int, most: int | None = None
) -> Rows:
    """Texts in pieces of equal length; what is left at a text's end is not used.

    Where the tokenizer puts a token before every text (Llama's, Gemma's), each piece begins with
    it, as a prompt does that is served.
    """
    first = tokenizer("")["input_ids"][:1]
    first = first if first == [tokenizer.bos_token_id] else []
    size = length - len(first)
    rows: Rows = []
    for path in [paths] if isinstance(paths, str) else paths:
        ids = tokenizer(read_text(path), add_special_tokens=False)["input_ids"]
        parts = [[*first, *ids[at : at + size]] for at in range(0, len(ids) - size + 1, size)]
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
    usual |= {"use_cpu": not torch.cuda.is_available(), "include_num_input_tokens_seen": "all"}
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
    last, done = last_checkpoint(folder) or (None, TrainerState())
    if last is not None and 0 < arguments.max_steps <= done.global_step:
        end = state_in(folder)  # has the last lines of a training that came to its end
        made.state = end if end is not None and end.global_step == done.global_step else done
        made._load_from_checkpoint(last)  # Trainer would go one step further
        return made
    made.train(resume_from_checkpoint=last)
    made.save_state()
    return made


def last_checkpoint(folder: Path) -> tuple[str, TrainerState] | None:
    """The last one that is whole, and its state. Later ones, whose saving was stopped, are removed:
    where times of files say nothing, Trainer takes them for newer than those it saves next."""
    steps = {each.name.removeprefix("checkpoint-"): each for each in folder.glob("checkpoint-*")}
    for step in sorted(filter(str.isdigit, steps), key=int, reverse=True):
        checkpoint = steps[step]
        state = state_in(checkpoint)  # is written last
        if state is not None:
            return str(checkpoint), state
        print(f"{checkpoint} was not saved to its end: it is removed", flush=True)
        shutil.rmtree(checkpoint)
    return None


def state_in(folder: Path) -> TrainerState | None:
    """A Trainer's state, where a folder has a whole one. What cannot be read otherwise is raised:
    it may be whole."""
    try:
        return TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


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
