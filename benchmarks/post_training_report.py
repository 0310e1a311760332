"""The picture and the table of :mod:`post_training`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


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
    columns = "KV at 2,048", "tokens", "perplexity", "after", "agreement", "after"
    table = Table("", *columns, "facts", "after")
    for name, found in result["ways"].items():
        points = [point["perplexity"] for point in found["curve"]]
        tokens = found["curve"][-1]["step"] * result["tokens_of_a_step"]
        cells = [f"{found['share_attended']:.1%}", f"{tokens:,}", f"{points[0]:.2f}"]
        cells += [f"{points[-1]:.2f}", *(f"{share:.1%}" for share in found.get("agreement", ()))]
        of = 12 * result["documents"]
        cells += [f"{sum(right.values())} of {of}" for right in found.get("right", ())]
        table.add_row(name, *cells)
    Console(width=150).print(table)
