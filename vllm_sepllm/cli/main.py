"""The command ``vllm-sepllm``: ``inspect`` shows what is attended, ``doctor`` what is installed,
``eval`` what it costs, ``tune`` finds options, ``size`` says what fits.

torch, transformers and vLLM are imported where they are needed, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vllm_sepllm.carried import carried_by, with_rule
from vllm_sepllm.cli.common import (
    InputError,
    check_least,
    exit_with,
    first_line,
    load_tokenizer,
    output,
    parse_options,
    read_text,
    status,
)
from vllm_sepllm.cli.evaluate import evaluate
from vllm_sepllm.cli.inspection import inspect_text, visible_text
from vllm_sepllm.cli.inspection_html import html_page
from vllm_sepllm.cli.inspection_memory import read_shape
from vllm_sepllm.cli.inspection_terminal import print_inspection
from vllm_sepllm.cli.sizing import size
from vllm_sepllm.cli.tuning import tune
from vllm_sepllm.config import PRESET, ConfigError

SAMPLE = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money "
    "in my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world.\nIt is a way I have of driving off the spleen, "
    "and regulating the circulation.\n"
)
SAMPLE_WINDOW = 16
SHOWN = 2000  # tokens, in a pipe
ON_A_PAGE = 20_000  # tokens
PAGE_START = b"<!doctype html>"

app = typer.Typer(
    help="Tools around SepLLM attention for vLLM.", no_args_is_help=True, add_completion=False
)
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="SepLLM option, e.g. -o window_size=64."
    ),
]


@app.command()
def inspect(
    model: Annotated[
        str, typer.Option(help="Folder or name of the model; its tokenizer and config.")
    ],
    text: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="UTF-8 text; - is standard input.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per page of the KV cache.")] = 32,
    option: Options = None,
    full: Annotated[bool, typer.Option("--full", help="Show all tokens; in a pager.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Tokens shown; 0 is --full. A page has the first ones, a terminal those of both "
            f"ends. By default {ON_A_PAGE} on a page, {SHOWN} in a pipe, and what fits into a "
            "terminal.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show which tokens of a text the last one attends to, and the pages they take."""
    options: dict[str, Any] = {}
    try:
        options = parse_options(option or [])
        if text is None:  # the sample is shorter than the usual window
            options.setdefault("window_size", SAMPLE_WINDOW)
        check_least("--block-size", block_size, 1, "32 is a common page size")
        limit = _limit(limit, full)
        source = SAMPLE if text is None else read_text(text)
        tokenizer = load_tokenizer(model)
        # A server takes the model's rule where nothing else is said.
        rule = carried_by(model)
        config = with_rule(options, rule, f"config.json of {model}")
        try:
            with status("cutting the text into tokens"):
                inspection = inspect_text(tokenizer, config, source, block_size)
        except ValueError as error:
            raise InputError(str(error)) from error
        if html is not None:
            shown = ON_A_PAGE if limit is None else limit
            _write(html, html_page(model, inspection, shown, read_shape(model)), text)
    except (InputError, ConfigError) as error:
        raise exit_with(f"{error}{_shell_hint(options)}", 2) from None
    if limit is None and not (sys.stdout and sys.stdout.isatty()):  # None where it is closed
        limit = SHOWN
    extra = [] if html is None else [f"wrote {html}"]
    if rule is not None and PRESET not in options:
        extra.append(f"What -o does not say is as config.json of {model} carries it.")
    with output() as console:
        print_inspection(console, inspection, limit, extra)


app.command("eval")(evaluate)
app.command("tune")(tune)
app.command("size")(size)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Folder or name of the model.")] = None,
    option: Options = None,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
) -> None:
    """Check the installation, and whether a model and options would be served."""
    try:
        options = parse_options(option or [])
    except InputError as error:
        raise exit_with(str(error), 2) from None
    try:
        from vllm_sepllm.engine.doctor import diagnose

        diagnosis = diagnose(model, options, dtype)
    except ImportError as error:
        raise exit_with(
            f"vLLM cannot be imported ({first_line(error)}): install it with pip install "
            "'vllm-sepllm[cpu]' or 'vllm-sepllm[cuda]'",
            1,
        ) from None
    except ConfigError as error:
        raise exit_with(str(error), 1) from None
    table = Table("what", "found", "", header_style="bold")
    for what, found, good in diagnosis.rows:
        mark = Text("ok", style="green") if good else Text("no", style="bold red")
        table.add_row(Text(what), Text(visible_text(found)), mark)
    with output() as console:
        console.print(table)
        for problem in diagnosis.problems:
            line = Text.assemble(("problem: ", "bold red"), visible_text(problem))
            console.print(line, soft_wrap=True)
        if not diagnosis.problems:
            console.print("nothing found that would keep SepLLM from being served", style="green")
    if diagnosis.problems:
        raise typer.Exit(1)


def _shell_hint(options: dict[str, Any]) -> str:
    """What to do where a shell took the quotation marks out of a list."""
    if any(isinstance(value, str) and value.startswith("[") for value in options.values()):
        return "; in a shell put the whole option into single quotes"
    return ""


def _limit(limit: int | None, full: bool) -> int | None:
    """``--limit`` and ``--full`` as one number: 0 is all, ``None`` what fits."""
    if limit is not None:
        check_least("--limit", limit, 0, "0 shows all tokens")
    if full and limit:
        raise InputError(f"--limit {limit} with --full, which shows all tokens: drop one of them")
    return 0 if full else limit


def _write(path: Path, page: str, text: str | None) -> None:
    """Write a page; what is there and is none is left alone."""
    try:
        if text not in (None, "-") and path.exists() and path.samefile(text):
            raise InputError(f"--html {str(path)!r} is the text itself: give another file")
        if path.is_file() and not _is_page(path):  # /dev/stdout is none
            raise InputError(f"--html {str(path)!r} exists and is no page: give another file")
        path.write_text(page, encoding="utf-8")
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"--html {str(path)!r} cannot be written ({reason}): give a file, with room for it, in "
            "a folder that exists and can be written to"
        ) from error


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(len(PAGE_START))
    return not start or start.lower() == PAGE_START
