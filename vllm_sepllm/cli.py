"""The command ``vllm-sepllm``: ``inspect`` shows what is attended, ``doctor`` what is installed.

torch, transformers and vLLM are imported where they are needed, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.inspection import (
    LEGEND,
    Inspection,
    TokenClass,
    inspect_text,
    summary_rows,
    visible_text,
)
from vllm_sepllm.inspection_html import html_page
from vllm_sepllm.policy import SepLLMPolicy
from vllm_sepllm.separators import resolve_separators

SAMPLE = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money "
    "in my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world.\nIt is a way I have of driving off the spleen, "
    "and regulating the circulation.\n"
)
SAMPLE_WINDOW = 16
STYLES = {
    TokenClass.SINK: "black on #8cc2f2",
    TokenClass.SEPARATOR: "black on #ffb547",
    TokenClass.WINDOW: "black on #9adbb5",
    TokenClass.DROPPED: "dim",
}

app = typer.Typer(
    help="Tools around SepLLM attention for vLLM.", no_args_is_help=True, add_completion=False
)
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="SepLLM option, e.g. -o window_size=64."
    ),
]


class InputError(ValueError):
    """Something given on the command line cannot be used; one sentence says what and why."""


@app.command()
def inspect(
    model: Annotated[str, typer.Option(help="Folder or name of the model; only its tokenizer.")],
    text: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="UTF-8 text; - is standard input.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per page of the KV cache.")] = 32,
    option: Options = None,
    limit: Annotated[int, typer.Option(help="Tokens shown, from both ends; 0 is all.")] = 2000,
) -> None:
    """Show which tokens of a text the last one attends to, and the pages they take."""
    try:
        options = parse_options(option or [])
        if text is None:  # the sample is shorter than the usual window
            options.setdefault("window_size", SAMPLE_WINDOW)
        config = SepLLMConfig.from_dict(options)
        _check_inspectable(config)
        _check_least("--block-size", block_size, 1, "32 is a common page size")
        _check_least("--limit", limit, 0, "0 shows all tokens")
        source = _read_text(text)
        tokenizer = _load_tokenizer(model)
        policy = _policy(config, tokenizer)
        try:
            inspection = inspect_text(tokenizer, policy, source, block_size, limit)
        except ValueError as error:
            raise InputError(str(error)) from error
        about = (
            f"{config.num_sink_tokens} sinks, window of {config.window_size}, "
            f"{int(policy.is_separator.sum())} separators in the vocabulary"
        )
        if html is not None:
            _write(html, html_page(f"SepLLM on {model}", about, inspection))
    except (InputError, ConfigError) as error:
        raise _exit(str(error), 2) from None
    _print_inspection(about, inspection)
    num_tokens = inspection.summary.num_tokens
    if num_tokens <= config.window_size:
        typer.echo(
            f"\nwindow_size={config.window_size} covers all {num_tokens} tokens, so nothing is "
            f"dropped: try a longer text or -o window_size={max(1, num_tokens // 4)}"
        )
    if html is not None:
        typer.echo(f"\nwrote {html}")


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
        raise _exit(str(error), 2) from None
    try:
        from vllm_sepllm.engine.doctor import diagnose

        diagnosis = diagnose(model, options, dtype)
    except ImportError as error:
        raise _exit(
            f"vLLM cannot be imported ({_first_line(error)}): install it with pip install "
            "'vllm-sepllm[cpu]' or 'vllm-sepllm[cuda]'",
            1,
        ) from None
    except ConfigError as error:
        raise _exit(str(error), 1) from None
    table = Table("what", "found", "", header_style="bold")
    for what, found, good in diagnosis.rows:
        mark = Text("ok", style="green") if good else Text("no", style="bold red")
        table.add_row(Text(what), Text(found), mark)
    console = Console()
    console.print(table)
    for problem in diagnosis.problems:
        console.print(Text.assemble(("problem: ", "bold red"), problem), soft_wrap=True)
    if diagnosis.problems:
        raise typer.Exit(1)
    console.print("nothing found that would keep SepLLM from being served", style="green")


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["window_size=64"]`` to ``{"window_size": 64}``.

    A value is JSON; what is not JSON is taken as a text, so ``separator_match=composed`` works.

    Raises:
        InputError: no ``=``, or a key given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"option {pair!r}: must be KEY=VALUE, e.g. window_size=64")
        if key in options:
            raise InputError(f"option {key!r} is given twice: keep one of them")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):
            options[key] = value
    return options


def _check_inspectable(config: SepLLMConfig) -> None:
    if config.policy != "sepllm":
        raise InputError(f"policy={config.policy!r}: inspect knows only 'sepllm'; drop the option")


def _check_least(name: str, value: int, least: int, remedy: str) -> None:
    if value < least:
        raise InputError(f"{name} {value}: must be at least {least}; {remedy}")


def _read_text(name: str | None) -> str:
    if name is None:
        return SAMPLE
    where = "standard input" if name == "-" else f"text file {name!r}"
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise InputError(
                f"{where} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv"
            ) from error
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise InputError(f"{where} cannot be read ({reason}): give a readable file") from error
    if not text:
        raise InputError(f"{where} is empty: give a text of at least one character")
    return text


def _load_tokenizer(model: str) -> Any:
    remedy = "give a folder that holds tokenizer.json, or a name on the Hugging Face Hub"
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not model or (is_path and not Path(model).is_dir()):
        raise InputError(f"model {model!r} is no folder: {remedy}")
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports every retry
    try:
        with Console(stderr=True).status("loading the tokenizer"):  # silent without a terminal
            return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # what transformers raises differs by version and by file
        reason = _first_line(error)
        raise InputError(
            f"model {model!r} has no tokenizer to load ({reason}): {remedy}"
        ) from error


def _policy(config: SepLLMConfig, tokenizer: Any) -> SepLLMPolicy:
    found = resolve_separators(config, tokenizer)
    try:
        return SepLLMPolicy.build(config.with_separator_ids(found.token_ids), len(tokenizer))
    except ValueError as error:
        raise InputError(str(error)) from error


def _print_inspection(about: str, inspection: Inspection) -> None:
    console = Console()
    shown = Text()
    for token in inspection.head:
        shown.append(visible_text(token.text), STYLES[token.kind])
    if inspection.num_hidden:
        shown.append(f"\n… {inspection.num_hidden:,} tokens not shown …\n", "italic")
    for token in inspection.tail:
        shown.append(visible_text(token.text), STYLES[token.kind])
    console.print(shown, soft_wrap=True)
    console.print()
    for kind, words in LEGEND.items():
        console.print(Text.assemble((f" {kind} ", STYLES[kind]), " ", words), soft_wrap=True)
    console.print(Text(f"\n{about}"), soft_wrap=True)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for what, value in summary_rows(inspection.summary):
        table.add_row(Text(what), Text(value))
    console.print(table)


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--html {str(path)!r} cannot be written ({error.strerror}): give a file in a "
            "folder that exists"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")


def _exit(message: str, code: int) -> typer.Exit:
    """Say ``message`` on standard error; the caller raises what it gets."""
    typer.echo(f"vllm-sepllm: {message}", err=True)
    return typer.Exit(code)
