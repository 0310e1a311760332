"""What post-training SmolLM2 under SepLLM wins back, beside dense attention and StreamingLLM.

    python benchmarks/post_training.py [--steps 400] [--ways "SepLLM 64, by logits"]

Every way sees the same tokens in the same order, by the recipe
``examples/training/post_train.py``: all weights, AdamW, learning rate 6e-5 with a cosine. The loss
is that of the text, or the distance from what the untrained model predicts with full attention ("by
logits"). StreamingLLM's window is as wide as SepLLM's last query sees tokens at 2,048.

Perplexity is that of the second halves of held-out pieces of 2,048 tokens, before, while it is
trained, and after. Training goes on where it stopped, and what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from record import ROOT, provenance, write
from rich.console import Console
from rich.table import Table

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.share import num_attended, window_of_equal_share
from vllm_sepllm.training import apply

sys.path.insert(0, str(ROOT / "examples/training"))
from common import perplexity, pieces, train
from post_train import DistillationTrainer

MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
OUTPUT = ROOT / "benchmarks/results/post_training.json"
FOLDER = ROOT / "build/training/smollm2"
TRAINED_ON = ["benchmarks/data/5396.txt.gz", "benchmarks/data/22424.txt.gz"]
HELD_OUT = ["benchmarks/data/35205.txt.gz", "examples/data/860.txt"]
LENGTH, HELD_OUT_LENGTH = 1024, 2048
TEXT, LOGITS = "by the text", "by logits"
DENSE = f"dense, {TEXT}"
SEPLLM = {size: {"num_sink_tokens": 4, "window_size": size} for size in (64, 256)}


def ways(tokenizer: Any, held_out: list[Any]) -> dict[str, tuple[dict[str, Any] | None, str]]:
    """Options and loss by name."""
    found: dict[str, tuple[dict[str, Any] | None, str]] = {DENSE: (None, TEXT)}
    for size, options in SEPLLM.items():
        config, ids = SepLLMConfig.from_dict(options), [row["input_ids"] for row in held_out]
        windows = [window_of_equal_share(config, tokenizer, text).window_size for text in ids]
        streaming = {"policy": "streaming", "window_size": sum(windows) // len(windows)}
        for loss in (TEXT, LOGITS):
            found[f"SepLLM {size}, {loss}"] = options, loss
            found[f"StreamingLLM, as much KV as SepLLM {size}, {loss}"] = streaming, loss
    return found


class Curve(transformers.TrainerCallback):  # type: ignore[misc]
    """Perplexity of held-out text every so many steps, written as it comes."""

    def __init__(self, result: dict[str, Any], output: Path, rows: list[Any], every: int) -> None:
        self._result, self._output, self._rows, self._every = result, output, rows, every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
        del args, control, more
        if state.global_step % self._every == 0:
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


def load() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def run(
    name: str, options: dict[str, Any] | None, loss: str, steps: int, curve: Curve, tokenizer: Any
) -> float:
    """Train one way; seconds."""
    rows = pieces(tokenizer, TRAINED_ON, LENGTH)
    model = load()
    if options is not None:
        apply(model, options, tokenizer)
    folder = FOLDER / name.replace(", ", "-").replace(" ", "_")
    curve.note(0, model)
    began = time.monotonic()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "learning_rate": 6e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "save_steps": 10,
        "logging_steps": 5,
    }
    kind: Any = transformers.Trainer
    if loss == LOGITS:
        DistillationTrainer.teacher = load().eval()
        kind = DistillationTrainer
    trainer = train(model, rows, arguments, kind, callbacks=[curve])
    trainer.save_model(str(folder / "model"))
    tokenizer.save_pretrained(folder / "model")
    curve.note(steps, model)
    return time.monotonic() - began


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out perplexity by training tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, found in result["ways"].items():
        steps = [point["step"] * 4 * LENGTH / 1000 for point in found["curve"]]
        axes.plot(steps, [point["perplexity"] for point in found["curve"]], "o-", label=name)
    axes.set(xlabel="training tokens, thousands", ylabel="perplexity of held-out text")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def show(result: dict[str, Any]) -> None:
    table = Table("", "KV at 2,048", "tokens", "before", "after")
    for name, found in result["ways"].items():
        points = [point["perplexity"] for point in found["curve"]]
        tokens = found["curve"][-1]["step"] * 4 * LENGTH
        cells = f"{found['share_attended']:.1%}", f"{tokens:,}", f"{points[0]:.2f}"
        table.add_row(name, *cells, f"{points[-1]:.2f}")
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of 4,096 tokens")
    parser.add_argument("--every", type=int, default=25, help="steps between points of the curve")
    parser.add_argument("--ways", help="only these, with semicolons between them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    held_out = pieces(tokenizer, HELD_OUT, HELD_OUT_LENGTH, 2)
    about = {
        "model": MODEL.name,
        "dtype": "float32",
        "steps": given.steps,
        "tokens_of_a_step": 4096,
    }
    result: dict[str, Any] = {**about, "ways": {}}
    if given.output.exists():
        earlier = json.loads(given.output.read_text(encoding="utf8"))
        if all(earlier.get(key) == value for key, value in about.items()):
            result = earlier
    curve = Curve(result, given.output, held_out, given.every)
    every = ways(tokenizer, held_out)
    for name in given.ways.split(";") if given.ways else every:
        if "seconds" in result["ways"].get(name, ()):
            continue
        options, loss = every[name]
        config = None if options is None else SepLLMConfig.from_dict(options)
        seen = [
            HELD_OUT_LENGTH if config is None else num_attended(config, tokenizer, row["input_ids"])
            for row in held_out
        ]
        of_way = result["ways"].setdefault(name, {"curve": []})
        of_way |= {**provenance("torch", "transformers"), "options": options, "loss": loss}
        of_way["share_attended"] = sum(seen) / len(seen) / HELD_OUT_LENGTH
        curve.begin(of_way)
        of_way["seconds"] = run(name, options, loss, given.steps, curve, tokenizer)
        write(given.output, result)
        plot(result, given.output.with_suffix(".png"))
    show(result)


if __name__ == "__main__":
    main()
