"""What post-training SmolLM2 under SepLLM wins back, beside dense attention and StreamingLLM.

    python benchmarks/post_training.py --train adapter [--ways "SepLLM 64, by logits"]
    python benchmarks/post_training.py --join FILE FILE

Every way sees the same tokens in the same order, by the recipe ``examples/training/post_train.py``:
AdamW with a cosine, all weights or an adapter. The loss is that of the text, or the distance from
what the untrained model predicts with full attention ("by logits"). StreamingLLM's window is as
wide as SepLLM's last query sees tokens at 2,048, where both hold as many. The second halves are
predicted from fewer by SepLLM, so perplexity is measured with StreamingLLM's window of an equal
mean, too. Two books and chats about them are trained on
(:mod:`make_chats`), and the ``*.txt`` files of a folder.

Before and after, and perplexity while training goes on, on held-out pieces of 2,048 tokens:

* perplexity of their second halves,
* agreement: where the likeliest token is that of the untrained model with full attention,
* questions about facts in long texts of held-out books (:mod:`retrieval`), asked of the served
  model when all ways are trained, the window being the way's own.

What is finished is not done again. On a CPU training goes on where it stopped; on a GPU, where it
takes a minute, a way begins anew. Ways can be shared out among processes, each with an ``--output``
of its own; ``--join`` puts their files together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from post_training_report import plot, show
from record import ROOT, processor, provenance, write
from retrieval import make_documents
from retrieval import measure as ask

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.share import (
    equal_window,
    mean_attended,
    num_attended,
    window_of_equal_share,
)
from vllm_sepllm.training import apply

sys.path.insert(0, str(ROOT / "examples/training"))
from common import Rows, likeliest, perplexity, pieces, train
from post_train import DistillationTrainer, with_adapter

MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
OUTPUTS = {
    "all": ROOT / "benchmarks/results/post_training.json",
    "adapter": ROOT / "benchmarks/results/post_training_adapters.json",
}
LEARNING_RATES = {"all": 2e-4, "adapter": 1e-3}
FOLDER = ROOT / "build/training/smollm2"
TRAINED_ON = [f"benchmarks/data/{name}" for name in ("5396.txt.gz", "22424.txt.gz", "chats.gz")]
HELD_OUT = ["benchmarks/data/35205.txt.gz", "examples/data/860.txt"]
HELD_OUT_LENGTH, HELD_OUT_PIECES = 2048, 4  # of each book
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
TEXT, LOGITS = "by the text", "by logits"
RULES: dict[str, dict[str, Any]] = {
    "SepLLM 64": {"num_sink_tokens": 4, "window_size": 64},
    "SepLLM 256": {"num_sink_tokens": 4, "window_size": 256},
    "facts": {"preset": "facts"},
}
UNTRAINED = "full attention, untrained"
EQUAL = "StreamingLLM, as much KV as "
ON_GPU = torch.cuda.is_available()
AT_ONCE = 4 if ON_GPU else 1  # texts


@dataclass(frozen=True)
class Way:
    """Options (``None`` is full attention), and the loss."""

    options: dict[str, Any] | None
    loss: str


def ways(tokenizer: Any, held_out: Rows) -> dict[str, Way]:
    """By name."""
    found = {f"dense, {TEXT}": Way(None, TEXT)}
    for rule, options in RULES.items():
        config, ids = SepLLMConfig.from_dict(options), [row["input_ids"] for row in held_out]
        windows = [window_of_equal_share(config, tokenizer, text).window_size for text in ids]
        streaming = {"policy": "streaming", "window_size": sum(windows) // len(windows)}
        for loss in (TEXT, LOGITS):
            found[f"{rule}, {loss}"] = Way(options, loss)
            found[f"{EQUAL}{rule}, {loss}"] = Way(streaming, loss)
    return found


def load(folder: Path | None = None) -> Any:
    """The model of a folder, or the untrained one; an adapter is merged into that."""
    folder = folder or MODEL
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(load(), folder)
        return model.merge_and_unload()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to("cuda") if ON_GPU else model


class Teacher(torch.nn.Module):
    """The untrained model; what its last layer gave for a text is kept for the next way."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._states: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """An object with ``logits``."""
        states = []
        for ids in input_ids:
            key = tuple(ids.tolist())
            if key not in self._states:
                found = self.model.model(input_ids=ids[None], use_cache=use_cache)
                is_lower = torch.is_autocast_enabled(ids.device.type)  # as the head then reads it
                dtype = torch.bfloat16 if is_lower else torch.float32
                self._states[key] = found.last_hidden_state[0].to(dtype)
            states.append(self._states[key])
        return SimpleNamespace(logits=self.model.lm_head(torch.stack(states)))


def agreement(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Share of the places where two models' likeliest tokens are the same."""
    same = torch.cat(found) == torch.cat(wanted)
    return float(same.float().mean())


class Asked:
    """How many facts a served model can tell, by kind; asked once per model and options."""

    def __init__(self, tokenizer: Any, num_documents: int) -> None:
        every = make_documents(tokenizer, 2 * num_documents)
        self._documents = every[::2]  # the others are of books that are trained on
        self._untrained: dict[str, dict[str, int]] = {}

    def before(self, options: dict[str, Any] | None) -> dict[str, int]:
        """Of the untrained model."""
        key = json.dumps(options)
        if key not in self._untrained:
            self._untrained[key] = self._of(MODEL, options)
        return self._untrained[key]

    def after(self, options: dict[str, Any] | None, folder: Path) -> dict[str, int]:
        """Of a trained model or adapter."""
        with tempfile.TemporaryDirectory() as merged:
            load(folder).save_pretrained(merged)
            transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(merged)
            return self._of(Path(merged), options)

    def _of(self, model: Path, options: dict[str, Any] | None) -> dict[str, int]:
        found: dict[str, int] = {}
        for row in ask(options, self._documents, model)["rows"]:
            found[row["kind"]] = found.get(row["kind"], 0) + row["right"]
        return found


class Curve(transformers.TrainerCallback):  # type: ignore[misc]
    """Perplexity of held-out text every so many steps, written as it comes."""

    def __init__(self, result: dict[str, Any], output: Path, rows: Rows, every: int) -> None:
        self._result, self._output, self._rows, self._every = result, output, rows, every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
        del args, control, more
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.note(state.global_step, model)

    def note(self, step: int, model: Any) -> None:
        """Measure now."""
        curve = self._of_way["curve"]
        if all(point["step"] != step for point in curve):
            curve.append({"step": step, "perplexity": perplexity(model, self._rows)})
            write(self._output, self._result)

    def begin(self, of_way: dict[str, Any]) -> None:
        """What is measured from now on is of this way."""
        self._of_way = of_way


def run(
    name: str, way: Way, rows: Rows, given: argparse.Namespace, curve: Curve, teacher: Teacher
) -> Any:
    """Train one way; the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = load()
    if given.train == "adapter":
        torch.manual_seed(0)
        model = with_adapter(model, ADAPTER)
    if way.options is not None:
        apply(model, way.options, tokenizer)
    folder = folder_of(name, given)
    curve.note(0, model)
    at_once = min(given.batch, AT_ONCE)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": given.steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": given.batch // at_once,
        "learning_rate": given.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "save_strategy": "no" if ON_GPU else "steps",
        "save_steps": 10,
        "logging_steps": 5,
        "bf16": given.bfloat16,
        "disable_tqdm": ON_GPU,
    }
    kind: Any = transformers.Trainer
    if way.loss == LOGITS:
        DistillationTrainer.teacher = teacher
        kind = DistillationTrainer
    trainer = train(model, rows, arguments, kind, callbacks=[curve])
    trainer.save_model(str(folder / "model"))
    tokenizer.save_pretrained(folder / "model")
    return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def folder_of(name: str, given: argparse.Namespace) -> Path:
    """Checkpoints of one way under one set of settings, and the trained model."""
    key = hashlib.sha256(json.dumps(about(given)).encode()).hexdigest()[:16]
    return FOLDER / key / name.replace(", ", "-").replace(" ", "_")


def training_rows(tokenizer: Any, given: argparse.Namespace) -> Rows:
    """Pieces of all texts, which are cut into tokens once."""
    texts = TRAINED_ON + [str(path) for path in sorted(given.texts.glob("*.txt"))]
    own = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in TRAINED_ON}
    parts = given.length, MODEL.name, own, about(given)["texts"]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    file = FOLDER / f"rows-{key}.npy"
    if not file.exists():
        rows = pieces(tokenizer, texts, given.length)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.array([row["input_ids"] for row in rows], dtype=np.int32))
    found: list[list[int]] = np.load(file).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in found]


def about(given: argparse.Namespace) -> dict[str, Any]:
    """What all ways of a file have in common."""
    files = sorted(given.texts.glob("*.txt"))
    return {
        "model": MODEL.name,
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "dtype": "bfloat16 under autocast" if given.bfloat16 else "float32",
        "train": given.train,
        "steps": given.steps,
        "length": given.length,
        "tokens_of_a_step": given.batch * given.length,
        "learning_rate": given.learning_rate,
        "documents": given.documents,
        "texts": {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files},
    }


def about_of(result: dict[str, Any]) -> dict[str, Any]:
    """Of a file, what :func:`about` wrote."""
    others = "ways", "processor", UNTRAINED, "note"
    return {key: value for key, value in result.items() if key not in others}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", choices=OUTPUTS, default="all", help="weights to train")
    parser.add_argument("--bfloat16", action="store_true", default=ON_GPU, help="under autocast")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=2048, help="of a text, tokens")
    parser.add_argument("--batch", type=int, default=2 * AT_ONCE, help="texts of a step")
    parser.add_argument("--learning-rate", type=float, help="its default depends on --train")
    parser.add_argument("--texts", type=Path, default=FOLDER / "texts", help="folder of more texts")
    parser.add_argument("--documents", type=int, default=4, help="with twelve facts each")
    parser.add_argument("--every", type=int, default=25, help="steps between points of the curve")
    parser.add_argument("--ways", help="only these, with semicolons between them")
    parser.add_argument("--join", type=Path, nargs="+", help="files of several processes")
    parser.add_argument("--output", type=Path, help="its default depends on --train")
    given = parser.parse_args()
    given.output = given.output or OUTPUTS[given.train]
    given.learning_rate = given.learning_rate or LEARNING_RATES[given.train]
    if given.batch > AT_ONCE and given.batch % AT_ONCE:
        parser.error(f"--batch {given.batch}: must be a multiple of {AT_ONCE} here")
    if given.join:
        parts = [json.loads(path.read_text(encoding="utf8")) for path in given.join]
        alike = [about_of(part) for part in parts]
        if any(each != alike[0] for each in alike):
            parser.error("the files to join are of runs with different settings")
        result = {**parts[0], "ways": {k: v for part in parts for k, v in part["ways"].items()}}
    else:
        result = measure(given)
    write(given.output, result)
    plot(result, given.output.with_suffix(".png"))
    show(result)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All ways that are asked for and not measured yet."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    held_out = pieces(tokenizer, HELD_OUT, HELD_OUT_LENGTH, HELD_OUT_PIECES)
    result: dict[str, Any] = {**about(given), "ways": {}, "processor": processor()}
    if given.output.exists():
        earlier = json.loads(given.output.read_text(encoding="utf8"))
        if all(earlier.get(key) == result[key] for key in about(given)):
            result = earlier
    rows = training_rows(tokenizer, given)
    untrained = load()
    teacher = Teacher(untrained)
    result[UNTRAINED], wanted = likeliest(untrained, held_out)
    curve = Curve(result, given.output, held_out, given.every)
    every = ways(tokenizer, held_out)
    for name in every if given.ways is None else filter(None, given.ways.split(";")):
        if "seconds" in result["ways"].get(name, ()):
            continue
        way, began = every[name], time.monotonic()
        seen = [HELD_OUT_LENGTH] * len(held_out)
        if way.options is not None:
            config = SepLLMConfig.from_dict(way.options)
            seen = [num_attended(config, tokenizer, row["input_ids"]) for row in held_out]
            attached = apply(untrained, way.options, tokenizer)
        if ON_GPU:
            result["ways"].pop(name, None)
        of_way = result["ways"].setdefault(name, {"curve": []})
        of_way |= {**provenance("torch", "transformers"), "options": way.options, "loss": way.loss}
        of_way["share_attended"] = sum(seen) / len(seen) / HELD_OUT_LENGTH
        before = agreement(likeliest(untrained, held_out)[1], wanted)
        if way.options is not None:
            attached.remove()
        curve.begin(of_way)
        model = run(name, way, rows, given, curve, teacher)
        of_way["agreement"] = [before, agreement(likeliest(model, held_out)[1], wanted)]
        of_way["seconds"] = time.monotonic() - began
        write(given.output, result)
    look_at_means(result, given, tokenizer, held_out)
    if given.documents:
        ask_all(result, given, tokenizer)
    return result


def look_at_means(
    result: dict[str, Any], given: argparse.Namespace, tokenizer: Any, held_out: Rows
) -> None:
    """How many tokens second halves are predicted from in the mean, and the perplexity of
    StreamingLLM with a window that makes this equal, before and after its training."""
    texts = [row["input_ids"] for row in held_out]
    for name, of_way in result["ways"].items():
        folder, options = folder_of(name, given) / "model", of_way["options"]
        is_missing = name.startswith(EQUAL) and "equal_mean" not in of_way and folder.is_dir()
        if options is None or "seconds" not in of_way:
            continue
        if "mean_attended" in of_way and not is_missing:
            continue
        if is_missing:
            rule = name.removeprefix(EQUAL).removesuffix(f", {of_way['loss']}")
            wanted = SepLLMConfig.from_dict(RULES[rule])
            window = equal_window(wanted, tokenizer, texts, 1, over_half=True)
            found = []
            for model in load(), load(folder):
                apply(model, {**options, "window_size": window}, tokenizer)
                found.append(perplexity(model, held_out))
            of_way["equal_mean"] = {"window_size": window, "perplexity": found}
        config = SepLLMConfig.from_dict(options)
        of_way["mean_attended"] = mean_attended(config, tokenizer, texts, 1, over_half=True)
        write(given.output, result)


def ask_all(result: dict[str, Any], given: argparse.Namespace, tokenizer: Any) -> None:
    """Ask every trained model that is still there about facts."""
    asked = Asked(tokenizer, given.documents)
    for name, of_way in result["ways"].items():
        folder = folder_of(name, given) / "model"
        if "right" in of_way or "seconds" not in of_way or not folder.is_dir():
            continue
        options = of_way["options"]
        of_way["right"] = [asked.before(options), asked.after(options, folder)]
        write(given.output, result)


if __name__ == "__main__":
    main()
