"""What the serving benchmark found, as lines, tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Point = dict[str, Any]
COLORS = ("tab:blue", "tab:orange", "tab:cyan", "tab:red")


def select(points: list[Point], **key: str) -> list[Point]:
    """Points of a model, a way or a trace, in the order of measurement."""
    return [point for point in points if all(point[name] == key[name] for name in key)]


def line(point: Point) -> str:
    """A point, while the benchmark runs."""
    failed = f", {point['failed']} FAILED" if point["failed"] else ""
    return (
        f"{point['trace']:9} {point['rate']:>5}/s: {point['requests_per_second']:.2f} requests/s, "
        f"{point['output_tokens_per_second']:.0f} tokens/s, "
        f"TTFT P99 {point['ttft_p99_ms']:.0f} ms, "
        f"{point['running_max']:.0f} at once, {point['preemptions']:.0f} preempted, "
        f"hits {point['prefix_hit_rate']:.0%}, {point['seconds']:.0f} s{failed}"
    )


def finite(points: list[Point]) -> dict[float, Point]:
    """By rate, without those whose requests all come at once."""
    return {point["rate"]: point for point in points if point["rate"] != "inf"}


def compare(points: dict[str, list[Point]]) -> list[tuple[str, str, list[float]]]:
    """Figures of one trace: what it is, its format, and its value for each way.

    Args:
        points: those of the trace, by way. The rates that latencies are compared at are the lowest
            and the highest one that every way was asked at.
    """
    series = list(points.values())
    common = set.intersection(*(set(finite(each)) for each in series))
    low, high = min(common), max(common)

    def most(key: str) -> list[float]:
        return [max(point[key] for point in each) for each in series]

    def at(rate: float, key: str) -> list[float]:
        return [finite(each)[rate][key] for each in series]

    return [
        ("requests/s, at most", "{:.2f}", most("requests_per_second")),
        ("output tokens/s, at most", "{:.0f}", most("output_tokens_per_second")),
        ("requests at once, most", "{:.0f}", most("running_max")),
        (f"TTFT P99, ms, at {low:g}/s", "{:,.0f}", at(low, "ttft_p99_ms")),
        (f"TPOT P99, ms, at {low:g}/s", "{:.1f}", at(low, "tpot_p99_ms")),
        (f"TTFT P99, ms, at {high:g}/s", "{:,.0f}", at(high, "ttft_p99_ms")),
        (f"TPOT P99, ms, at {high:g}/s", "{:.1f}", at(high, "tpot_p99_ms")),
        (f"preemptions, at {high:g}/s", "{:.0f}", at(high, "preemptions")),
        (f"prefix hits, at {high:g}/s", "{:.1%}", at(high, "prefix_hit_rate")),
        ("failed", "{:.0f}", [sum(point["failed"] for point in each) for each in series]),
    ]


def table(content: dict[str, Any], model: str) -> Table:
    """One model; the ratio is the first way's figure over the second's."""
    points = select(content["points"], model=model)
    settings = content["settings"][model]
    ways = [way for way in settings["ways"] if select(points, way=way)]
    title = f"{model}: {settings['kv_mib']} MiB of KV cache, window {settings['window']}"
    found = Table(title=title)
    for column in ("trace", "", *ways, *(["ratio"] if len(ways) > 1 else [])):
        found.add_column(column, justify="left" if column in ("trace", "") else "right")
    for trace in settings["traces"]:
        by_way = {way: select(points, way=way, trace=trace) for way in ways}
        if not all(by_way.values()):
            continue
        for i, (name, form, values) in enumerate(compare(by_way)):
            row = [trace if i == 0 else "", name, *map(form.format, values)]
            if len(ways) > 1:
                row.append(f"{values[0] / values[1]:.2f}" if values[1] else "")
            found.add_row(*row)
        found.add_section()
    return found


def show(content: dict[str, Any], console: Console) -> None:
    for model in content["settings"]:
        if select(content["points"], model=model):
            console.print(table(content, model))


def plot(content: dict[str, Any], path: Path) -> None:
    """Tokens per second against the time to a first token, a panel for each model and trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    settings = content["settings"]
    models = [model for model in settings if select(content["points"], model=model)]
    if not models:
        return
    columns = max(len(settings[model]["traces"]) for model in models)
    size = (4.6 * columns, 3.6 * len(models))
    figure, panels = pyplot.subplots(
        len(models), columns, figsize=size, layout="constrained", squeeze=False
    )
    for model, row in zip(models, panels, strict=True):
        for trace, panel in zip(settings[model]["traces"], row, strict=True):
            for way, color in zip(settings[model]["ways"], COLORS, strict=False):
                points = select(content["points"], model=model, way=way, trace=trace)
                x = [point["ttft_p99_ms"] / 1000 for point in points]
                y = [point["output_tokens_per_second"] for point in points]
                panel.plot(x, y, marker="o", markersize=4, label=way, color=color)
                for point, place in zip(points, zip(x, y, strict=True), strict=True):
                    rate = "all" if point["rate"] == "inf" else f"{point['rate']:g}"
                    panel.annotate(
                        rate, place, (3, 4), textcoords="offset points", fontsize=7, color=color
                    )
            panel.set(title=f"{model}, {trace}", xscale="log", ylim=(0, None))
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set(xlabel="TTFT P99, seconds", ylabel="output tokens per second")
    panels[0][0].legend(fontsize=8)
    figure.suptitle("At each point: requests sent per second, or all at once", fontsize=9)
    figure.savefig(path, dpi=90)
