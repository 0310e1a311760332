"""What post-training SmolLM2 under SepLLM wins back, beside dense attention and StreamingLLM.

    python benchmarks/post_training.py [--ways "SepLLM 64, by logits"] [--texts FOLDER]
    python benchmarks/post_training.py --join FILE FILE

Every way sees the same tokens in the same order, by the recipe ``examples/training/post_train.py``:
AdamW with a cosine, all weights or an adapter. The loss is that of the text, or the distance from
what the untrained model predicts with full attention ("by logits"). StreamingLLM's window is as
wide as SepLLM's last query sees tokens at 2,048. Books of the repository are trained on, and the
``*.txt`` files of a folder.

Before and after, and perplexity while training goes on, on held-out pieces of 2,048 tokens:

* perplexity of their second halves,
* agreement: where the likeliest token is that of the untrained model with full attention,
* questions about facts in long texts (:mod:`retrieval`), the window being the way's own.

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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from record import ROOT, provenance, write
from retrieval import NEW_TOKENS, make_documents
from rich.console import Console
from rich.table import Table

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.share import num_attended, window_of_equal_share
from vllm_sepllm.training import apply

sys.path.insert(0, str(ROOT / "examples/training"))
from common import Rows, likeliest, perplexity, pieces, train
from post_train import DistillationTrainer, with_adapter

MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
OUTPUT = ROOT / "benchmarks/results/post_training.json"
FOLDER = ROOT / "build/training/smollm2"
TRAINED_ON = ["benchmarks/data/5396.txt.gz", "benchmarks/data/22424.txt.gz"]
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
WITH_ADAPTER = ", adapter"
ON_GPU = torch.cuda.is_available()
AT_ONCE = 4 if ON_GPU else 1  # texts


@dataclass(frozen=True)
class Way:
    """Options (``None`` is full attention), loss, and whether only an adapter is trained."""

    options: dict[str, Any] | None
    loss: str
    is_adapter: bool = False

    def learning_rate(self, of_all_weights: float) -> float:
        """An adapter's few weights take larger steps."""
        return of_all_weights * (5 if self.is_adapter else 1)


def ways(tokenizer: Any, held_out: Rows) -> dict[str, Way]:
    """By name."""
    found = {f"dense, {TEXT}": Way(None, TEXT)}
    for rule, options in RULES.items():
        config, ids = SepLLMConfig.from_dict(options), [row["input_ids"] for row in held_out]
        windows = [window_of_equal_share(config, tokenizer, text).window_size for text in ids]
        streaming = {"policy": "streaming", "window_size": sum(windows) // len(windows)}
        for loss in (TEXT, LOGITS):
            found[f"{rule}, {loss}"] = Way(options, loss)
            found[f"StreamingLLM, as much KV as {rule}, {loss}"] = Way(streaming, loss)
        found[f"{rule}{WITH_ADAPTER}, {LOGITS}"] = Way(options, LOGITS, is_adapter=True)
    return found


def load() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.to("cuda") if ON_GPU else model


def agreement(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Share of the places where two models' likeliest tokens are the same."""
    same = torch.cat(found) == torch.cat(wanted)
    return float(same.float().mean())


@torch.no_grad()
def right_answers(model: Any, tokenizer: Any, num_documents: int) -> dict[str, int]:
    """Facts told, by kind."""
    was_training = model.training
    model.eval()
    found: dict[str, int] = {}
    for document in make_documents(tokenizer, num_documents):
        prompts = [document.prompt(tokenizer, fact) for fact in document.facts]
        longest = max(len(ids) for ids in prompts)
        padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        answers = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        for fact, ids in zip(document.facts, answers[:, longest:], strict=True):
            is_right = fact.is_right(tokenizer.decode(ids, skip_special_tokens=True))
            found[fact.kind] = found.get(fact.kind, 0) + is_right
    model.train(was_training)
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
    name: str, way: Way, rows: Rows, given: argparse.Namespace, curve: Curve, tokenizer: Any
) -> Any:
    """Train one way; the model."""
    model = load()
    if way.is_adapter:
        torch.manual_seed(0)
        model = with_adapter(model, ADAPTER)
    if way.options is not None:
        apply(model, way.options, tokenizer)
    folder = FOLDER / name.replace(", ", "-").replace(" ", "_")
    curve.note(0, model)
    at_once = min(given.batch, AT_ONCE)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": given.steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": given.batch // at_once,
        "learning_rate": way.learning_rate(given.learning_rate),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "save_strategy": "no" if ON_GPU else "steps",
        "save_steps": 10,
        "logging_steps": 5,
        "bf16": ON_GPU,
        "disable_tqdm": ON_GPU,
    }
    kind: Any = transformers.Trainer
    if way.loss == LOGITS:
        DistillationTrainer.teacher = load().eval()
        kind = DistillationTrainer
    trainer = train(model, rows, arguments, kind, callbacks=[curve])
    trainer.save_model(str(folder / "model"))
    tokenizer.save_pretrained(folder / "model")
    return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out perplexity by training tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    for number, (name, found) in enumerate(result["ways"].items()):
        tokens = [point["step"] * result["tokens_of_a_step"] / 1e6 for point in found["curve"]]
        line = "--" if name.startswith("StreamingLLM") else "-"
        points = [point["perplexity"] for point in found["curve"]]
        axes.plot(tokens, points, line, color=f"C{number % 10}", label=name)
    axes.set(xlabel="training tokens, millions", ylabel="perplexity of held-out books")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def show(result: dict[str, Any]) -> None:
    columns = "KV at 2,048", "tokens", "perplexity", "after", "agreement", "after", "facts"
    table = Table("", *columns)
    for name, found in result["ways"].items():
        points = [point["perplexity"] for point in found["curve"]]
        tokens = found["curve"][-1]["step"] * result["tokens_of_a_step"]
        cells = [f"{found['share_attended']:.1%}", f"{tokens:,}", f"{points[0]:.2f}"]
        cells += [f"{points[-1]:.2f}", *(f"{x:.1%}" for x in found.get("agreement", ()))]
        if found.get("right"):
            cells.append(f"{sum(found['right'].values())} of {12 * result['documents']}")
        table.add_row(name, *cells)
    Console(width=150).print(table)


def training_rows(tokenizer: Any, given: argparse.Namespace) -> Rows:
    """Pieces of all texts, which are cut into tokens once."""
    texts = TRAINED_ON + [str(path) for path in sorted(given.texts.glob("*.txt"))]
    parts = given.length, TRAINED_ON, about(given)["texts"]
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
        "dtype": "bfloat16 under autocast" if ON_GPU else "float32",
        "steps": given.steps,
        "length": given.length,
        "tokens_of_a_step": given.batch * given.length,
        "learning_rate": given.learning_rate,
        "documents": given.documents,
        "texts": {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files},
    }


def about_of(result: dict[str, Any]) -> dict[str, Any]:
    """Of a file, what :func:`about` wrote."""
    return {key: x for key, x in result.items() if key not in ("ways", UNTRAINED, "note")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=1024, help="of a text, tokens")
    parser.add_argument("--batch", type=int, default=4, help="texts of a step")
    parser.add_argument("--learning-rate", type=float, default=6e-5)
    parser.add_argument("--texts", type=Path, default=FOLDER / "texts", help="folder of more texts")
    parser.add_argument("--documents", type=int, default=0, help="with facts to be told")
    parser.add_argument("--every", type=int, default=25, help="steps between points of the curve")
    parser.add_argument("--ways", help="only these, with semicolons between them")
    parser.add_argument("--join", type=Path, nargs="+", help="files of several processes")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
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
    result: dict[str, Any] = {**about(given), "ways": {}}
    if given.output.exists():
        earlier = json.loads(given.output.read_text(encoding="utf8"))
        if all(earlier.get(key) == result[key] for key in about(given)):
            result = earlier
    rows = training_rows(tokenizer, given)
    untrained = load()
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
        of_way["learning_rate"] = way.learning_rate(given.learning_rate)
        of_way["share_attended"] = sum(seen) / len(seen) / HELD_OUT_LENGTH
        before = agreement(likeliest(untrained, held_out)[1], wanted)
        if way.options is not None:
            attached.remove()
        curve.begin(of_way)
        model = run(name, way, rows, given, curve, tokenizer)
        of_way["agreement"] = [before, agreement(likeliest(model, held_out)[1], wanted)]
        if given.documents:
            of_way["right"] = right_answers(model, tokenizer, given.documents)
        of_way["seconds"] = time.monotonic() - began
        write(given.output, result)
    return result


if __name__ == "__main__":
    main()
