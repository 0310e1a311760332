"""What training from scratch under SepLLM gives, beside full attention on the same tokens.

    python examples/training/pretrain.py --set training.output_dir=build/training/pretrain
    python benchmarks/pretraining.py build/training/pretrain

Takes the recipe's summaries, one folder or several whose recipes differ only in what was trained,
and writes the losses by token, operation and second, as JSON and as a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from record import ROOT, provenance, write
from rich.console import Console
from rich.table import Table

OUTPUT = ROOT / "benchmarks/results/pretraining.json"
PERPLEXITY = "perplexity of held-out text"


def curve(found: dict[str, Any]) -> list[dict[str, float]]:
    """Loss by tokens, operations and seconds."""
    return [
        {
            "tokens": entry["num_input_tokens_seen"],
            "operations": entry["num_input_tokens_seen"] / found["tokens"] * found["operations"],
            "seconds": entry["seconds"],
            "loss": float(entry["loss"]),
        }
        for entry in found["log"]
        if "loss" in entry
    ]


def recipe(folder: Path) -> dict[str, Any]:
    """What a folder was trained with, but for which attention."""
    found: dict[str, Any] = json.loads((folder / "recipe.json").read_text(encoding="utf8"))
    del found["model"]["attention"]
    found["training"].pop("output_dir", None)
    return found


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss by token, operation and second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, sides = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained", sharey=True)
    for axes, key, unit in zip(
        sides, ("tokens", "operations", "seconds"), ("M", "T", ""), strict=True
    ):
        scale = {"M": 1e6, "T": 1e12, "": 1}[unit]
        for name, way in result["ways"].items():
            points = way["curve"]
            axes.plot([p[key] / scale for p in points], [p["loss"] for p in points], label=name)
        axes.set(xlabel=f"training {key}{f', {unit}' if unit else ''}")
        axes.grid(alpha=0.3)
    sides[0].set(ylabel="training loss, nats per token")
    sides[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="of the recipe")
    parser.add_argument("--note", help="what has to be known of the times")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    recipes = [recipe(folder) for folder in given.folders]
    if any(each != recipes[0] for each in recipes):
        parser.error("the folders are of recipes with different settings")
    ways: dict[str, Any] = {}
    for folder in given.folders:
        for name, found in json.loads((folder / "summary.json").read_text(encoding="utf8")).items():
            figures = {key: found[key] for key in (PERPLEXITY, "tokens", "operations")}
            seconds = found["log"][-1]["seconds"]
            ways[name] = {**figures, "seconds": seconds, "curve": curve(found)}
    about = {**provenance("torch", "transformers"), "note": given.note, "recipe": recipes[0]}
    result = {**about, "ways": ways}
    write(given.output, result)
    plot(result, given.output.with_suffix(".png"))
    table = Table("", "tokens", "operations", "seconds", PERPLEXITY)
    for name, way in ways.items():
        cells = f"{way['tokens']:,}", f"{way['operations']:.3g}", f"{way['seconds']:.0f}"
        table.add_row(name, *cells, f"{way[PERPLEXITY]:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
