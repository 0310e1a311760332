"""``vllm-sepllm inspect`` in a terminal: as much of a text as fits, or all of it in a pager."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, groupby

from rich.cells import get_character_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_sepllm.cli.inspection import Excerpt, Inspection, Token, TokenClass, visible_text
from vllm_sepllm.cli.inspection_words import describe, labels, legend, notices, summary_rows

COLOURS: dict[str, str] = {
    TokenClass.SINK: "black on #8cc2f2",
    TokenClass.CHOSEN: "black on #ffb547",
    TokenClass.WINDOW: "black on #9adbb5",
    TokenClass.DROPPED: "dim",
}
NO_COLOURS: dict[str, str] = {  # as NO_COLOR asks for; a terminal still has these
    TokenClass.SINK: "bold",
    TokenClass.CHOSEN: "reverse",
    TokenClass.WINDOW: "underline",
    TokenClass.DROPPED: "dim",
}
# Of classes of ``keep`` beside separators, one after the other, and again from the first.
CLASS_COLOURS = "black on #d3b4f0", "black on #f3a3a0", "black on #e6d96f", "black on #c9cfd6"
CLASS_NO_COLOURS = "reverse dim", "reverse bold", "reverse italic", "reverse underline"
TAB = 8
LEAST_ROWS = 5  # of the text, however low the terminal is
LOW = 40  # a terminal of fewer rows gets the names of the classes without their meaning
TABLE_WIDTH = 40  # a narrower terminal gets lines instead


def fitting(inspection: Inspection, rows: int, width: int) -> Excerpt:
    """The beginning and the end of a text that fill ``rows`` lines of ``width`` cells."""
    texts = inspection.texts
    if num_fitting(texts, rows, width) == len(texts):
        return inspection.ends(0)
    rows -= 1  # what says how many are left out
    head = num_fitting(texts, rows - rows // 2, width)
    tail = num_fitting((text[::-1] for text in reversed(texts)), rows // 2, width)
    return inspection.excerpt(max(1, head), max(1, tail))


def num_fitting(texts: Iterable[str], rows: int, width: int) -> int:
    """How many of the texts, one behind the other, fit into ``rows`` lines of ``width`` cells."""
    row, column, count = 1, 0, 0
    for text in texts:
        for char in visible_text(text):
            if char == "\n":
                row, column = row + 1, 0
                continue
            cells = TAB - column % TAB if char == "\t" else get_character_cell_size(char)
            if column + cells > width:
                row, column = row + 1, 0
            column += cells
        if row > rows:
            return count
        count += 1
    return count


def print_inspection(
    console: Console, inspection: Inspection, limit: int | None, extra: Sequence[str] = ()
) -> None:
    """Print tokens, legend and counts.

    Args:
        console: where to.
        inspection: what.
        limit: tokens shown of both ends together, 0 for all, in a pager if there is one;
            ``None`` for as many as fit above the rest.
        extra: lines behind everything else.
    """
    # Of sixteen colours several classes would get the same.
    few_colours = console.no_color or console.color_system == "standard"
    styles = styles_of(inspection, few_colours)
    brief = limit is None and console.height < LOW
    names = _legend(inspection, styles, brief)
    below = [Text(), *names, Text(), *_facts(console, inspection, extra)]
    if limit is None:
        taken = sum(_height(console, part) for part in below) + 1  # and the next prompt
        shown = fitting(inspection, max(LEAST_ROWS, console.height - taken), console.width)
    else:
        shown = inspection.ends(limit)
    text = _coloured(shown, styles)
    command = pager_command(console) if limit == 0 else None
    if command is None or not _page(console, command, [*_legend(inspection, styles), Text(), text]):
        console.print(text, soft_wrap=True)
    for part in below:
        console.print(part, soft_wrap=isinstance(part, Text))


def styles_of(inspection: Inspection, few_colours: bool) -> dict[str, str]:
    """The style of each kind of token."""
    fixed, more = (NO_COLOURS, CLASS_NO_COLOURS) if few_colours else (COLOURS, CLASS_COLOURS)
    others = [kind for kind in labels(inspection.config) if kind not in fixed]
    return {**fixed, **dict(zip(others, cycle(more), strict=False))}


def _coloured(shown: Excerpt, styles: Mapping[str, str]) -> Text:
    text = Text(tab_size=TAB)
    _append(text, shown.head, styles)
    if shown.num_hidden:
        text.append(f"\n… {shown.num_hidden:,} tokens not shown, --full shows all …\n", "italic")
    _append(text, shown.tail, styles)
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


def _append(text: Text, tokens: list[Token], styles: Mapping[str, str]) -> None:
    """Add tokens; neighbours of one class make one span, or a book takes long to render."""
    for kind, group in groupby(tokens, lambda token: token.kind):
        text.append(visible_text("".join(token.text for token in group)), styles[kind])


def _legend(inspection: Inspection, styles: Mapping[str, str], brief: bool = False) -> list[Text]:
    names = {kind: (f" {name} ", styles[kind]) for kind, name in labels(inspection.config).items()}
    if brief:
        return [Text(" ").join(Text.assemble(name) for name in names.values())]
    meanings = legend(inspection.config)
    return [Text.assemble(name, " ", meanings[kind]) for kind, name in names.items()]


def _facts(console: Console, inspection: Inspection, extra: Sequence[str]) -> list[Text | Table]:
    """Options, counts and what else is to be said."""
    parts: list[Text | Table] = [Text(visible_text(describe(inspection)))]
    if console.color_system is None:
        parts.append(Text("The classes are shown by colour, and here is none: see --html."))
    rows = summary_rows(inspection)
    if console.width < TABLE_WIDTH:
        parts += [Text(f"{what}: {value}") for what, value in rows]
    else:
        table = Table(show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right", overflow="fold")
        for what, value in rows:
            table.add_row(Text(what), Text(value))
        parts.append(table)
    for line in notices(inspection):
        parts += [Text(), Text(visible_text(line), "bold")]
    for line in extra:
        parts += [Text(), Text(visible_text(line))]
    return parts


def _height(console: Console, part: Text | Table) -> int:
    """Lines of the terminal that ``part`` takes."""
    if isinstance(part, Table):
        return len(console.render_lines(part, pad=False))
    width = part.cell_len
    return max(1, -(-width // console.width))


def pager_command(console: Console) -> list[str] | None:
    """What shows long output in a terminal; ``None`` without terminal or pager."""
    if not console.file.isatty() or console.is_dumb_terminal:
        return None
    try:
        command = shlex.split(os.environ.get("PAGER", "less -R"))
    except ValueError:  # a quotation mark without its other half
        return None
    return command if command and shutil.which(command[0]) else None


def _page(console: Console, command: Sequence[str], parts: Sequence[Text]) -> bool:
    """Show ``parts`` with the pager ``command``; false if it cannot be started."""
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=True)
    environment = {"LESS": "R", **os.environ}  # without R less shows colours as ESC[...
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    except OSError:
        return False
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):  # left before the end
        process.stdin.write(capture.get().encode("utf-8", "replace"))
        process.stdin.close()
    while True:
        try:
            process.wait()
            return True
        except KeyboardInterrupt:  # belongs to the pager, which stops searching and goes on
            continue
