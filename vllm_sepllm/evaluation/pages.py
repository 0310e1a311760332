"""The report as Markdown, and as a picture: quality against the KV cache that is held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sepllm.evaluation.material import CHAT, DOCUMENT, Question
from vllm_sepllm.evaluation.report import Figures, controls, grid, sentence
from vllm_sepllm.evaluation.ways import FULL

Points = list[tuple[float, float]]


def markdown(
    title: str,
    about: str,
    found: dict[str, Figures],
    questions: Sequence[Question],
    without: Sequence[Question],
) -> str:
    """The whole report."""
    parts = [f"# {title}", about, "![quality against KV held](report.png)", "## All ways"]
    parts += [_table(summary(found, questions)), LEGEND]
    checks = controls(found, questions, without)
    parts += ["## Does the measurement see anything?"]
    for name, sees, text in checks:
        parts.append(f"* {name}: {text}{'' if sees else ' **The measurement is blind to this.**'}")
    told = "\n".join(f"* {text}" for text in sentences(found))
    parts += ["## Beside StreamingLLM with as much KV", told]
    parts += ["## Questions by length of the document, and how far the fact is from its end"]
    parts += [_table(_grids(found, questions))]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "KV held: bytes in the pages that the engine held for a text and for a question while it "
    "decoded, as a share of what full attention held for the same. Peak: the most, which is while "
    "a prompt is computed. Attended: share of tokens attended to, mean over the predicted tokens "
    "of texts, and by the end of questions; StreamingLLM is equal in these. Not served: measured "
    "with Transformers, and the pages that a cache would hold are counted; PoD's layers are put "
    "together on the same texts. Perplexity: of the second halves of texts. Agreement: where the "
    "likeliest token is full attention's."
)


def sentences(found: dict[str, Figures]) -> list[str]:
    """What each way wins and loses beside StreamingLLM with as much KV."""
    return [text for name in found if (text := sentence(found, name)) is not None]


def summary(found: dict[str, Figures], questions: Sequence[Question]) -> list[list[str]]:
    """Rows; StreamingLLM stands below what it equals."""
    head = ["", "KV held, texts", "peak", "attended", "perplexity", "agreement"]
    head += ["KV held, questions", "peak", "attended", "facts in documents"]
    rows = [[*head, "facts in conversations"]]
    for name in ordered(found):
        one = found[name]
        memory = {
            task: [_percent(share) for share in (*one.held[task].values(), one.ideal[task])]
            for task in ("texts", "questions")
        }
        cells = [*memory["texts"], f"{one.perplexity:.2f}"]
        cells += [f"{one.agreement:.1%}", *memory["questions"]]
        for setting in (DOCUMENT, CHAT):
            marked = one.of_setting(questions, setting)
            cells.append(f"{sum(marked)} of {len(marked)}")
        rows.append([one.shown, *cells])
    return rows


def brief(found: dict[str, Figures], questions: Sequence[Question]) -> list[list[str]]:
    """The columns of :func:`summary` that fit into a terminal."""
    chosen = 0, 1, 4, 6, 9, 10
    head, *rows = ([row[column] for column in chosen] for row in summary(found, questions))
    short = {"KV held, texts": "KV,\ntexts", "KV held, questions": "KV,\nquestions"}
    short |= {"facts in documents": "facts", "facts in conversations": "in\nchats"}
    return [[short.get(name, name) for name in head], *rows]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def ordered(found: dict[str, Figures]) -> list[str]:
    """Names, each StreamingLLM behind the first way that it equals."""
    names: list[str] = []
    equals = {one.way.equal for one in found.values()}
    for name, one in found.items():
        if name not in equals:
            names.append(name)
        if one.way.equal in found and one.way.equal not in names:
            names.append(str(one.way.equal))
    return names


def _grids(found: dict[str, Figures], questions: Sequence[Question]) -> list[list[str]]:
    groups = grid(found[FULL], questions)
    rows = [["", *(f"{group}, {back:,} back" for group, row in groups.items() for back in row)]]
    for name in ordered(found):
        by_group = grid(found[name], questions).values()
        rows.append(
            [found[name].shown, *(f"{r} of {of}" for row in by_group for r, of in row.values())]
        )
    return rows


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = f"|---|{'---:|' * (len(rows[0]) - 1)}"
    return "\n".join([head, rule, *body])


def front(points: Points) -> Points:
    """Those that no other point beats: less held, and better. Larger ``y`` is better."""
    best: Points = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def _marker(one: Figures, is_equal: bool) -> str:
    if one.way.is_control:
        return "x"
    return "^" if not one.way.is_served else "s" if is_equal else "o"


def plot(found: dict[str, Figures], path: Path) -> None:
    """Perplexity and right answers against the KV held, each with the front of the best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    equals = {one.way.equal for one in found.values()}
    sides: dict[Any, Points] = {left: [], right: []}
    for number, name in enumerate(ordered(found), 1):
        one = found[name]
        marker = _marker(one, name in equals)
        colour = "0.6" if name in equals else f"C{number % 10}"
        share = 100 * sum(one.right) / len(one.right)
        values = ("texts", left, one.perplexity), ("questions", right, share)
        for task, axes, value in values:
            x = 100 * (one.held[task]["mean"] or 0)
            label = f"{number}  {one.shown}" if axes is left else None
            axes.plot(x, value, marker, color=colour, label=label)
            axes.annotate(str(number), (x, value), xytext=(5, 3), textcoords="offset points")
            if one.way.is_served and not one.way.is_control:
                sides[axes].append((x, -value if axes is left else value))
    for axes, points in sides.items():
        best = front(points)
        ys = [-y if axes is left else y for _, y in best]
        axes.step([x for x, _ in best], ys, where="post", color="0.4", linewidth=0.8)
        axes.set(xlabel="KV cache held, % of full attention's")
        axes.grid(alpha=0.3)
    left.set(ylabel="perplexity (lower is better)", yscale="log")
    left.yaxis.set_major_formatter("{x:.4g}")
    left.yaxis.set_minor_formatter("{x:.4g}")
    right.set(ylabel="questions answered, %", ylim=(-4, 104))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
