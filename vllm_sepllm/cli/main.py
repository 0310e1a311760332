"""The command ``vllm-sepllm``: ``inspect`` shows what is attended, ``doctor`` what is installed.

torch, transformers and vLLM are imported where they are needed, so that ``--help`` is quick.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from vllm_sepllm.cli.inspection import inspect_text, visible_text
from vllm_sepllm.cli.inspection_html import html_page
from vllm_sepllm.cli.inspection_terminal import print_inspection
from vllm_sepllm.config import ConfigError, SepLLMConfig

SAMPLE = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money "
    "in my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world.\nIt is a way I have of driving off the spleen, "
    "and regulating the circulation.\n"
)
SAMPLE_WINDOW = 16
MAX_TEXT = 2**23  # bytes; more takes minutes and gigabytes to cut into tokens
SHOWN = 2000  # tokens, on a page and in a pipe

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
    full: Annotated[bool, typer.Option("--full", help="Show all tokens; in a pager.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Tokens shown, from both ends; 0 is --full. By default what fits into a "
            f"terminal, and {SHOWN} on a page or in a pipe.",
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
        config = SepLLMConfig.from_dict(options)
        _check_least("--block-size", block_size, 1, "32 is a common page size")
        limit = _limit(limit, full)
        source = _read_text(text)
        tokenizer = _load_tokenizer(model)
        try:
            with _status("cutting the text into tokens"):
                inspection = inspect_text(tokenizer, config, source, block_size)
        except ValueError as error:
            raise InputError(str(error)) from error
        if html is not None:
            shown = inspection.ends(SHOWN if limit is None else limit)
            _write(html, html_page(model, inspection, shown), text)
    except (InputError, ConfigError) as error:
        raise _exit(f"{error}{_shell_hint(options)}", 2) from None
    if limit is None and not (sys.stdout and sys.stdout.isatty()):  # None where it is closed
        limit = SHOWN
    extra = [] if html is None else [visible_text(f"wrote {html}")]
    with _output() as console:
        print_inspection(console, inspection, limit, extra)


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
        table.add_row(Text(what), Text(visible_text(found)), mark)
    with _output() as console:
        console.print(table)
        for problem in diagnosis.problems:
            line = Text.assemble(("problem: ", "bold red"), visible_text(problem))
            console.print(line, soft_wrap=True)
        if not diagnosis.problems:
            console.print("nothing found that would keep SepLLM from being served", style="green")
    if diagnosis.problems:
        raise typer.Exit(1)


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


def _check_least(name: str, value: int, least: int, remedy: str) -> None:
    if value < least:
        raise InputError(f"{name} {value}: must be at least {least}; {remedy}")


def _shell_hint(options: dict[str, Any]) -> str:
    """What to do where a shell took the quotation marks out of a list."""
    if any(isinstance(value, str) and value.startswith("[") for value in options.values()):
        return "; in a shell put the whole option into single quotes"
    return ""


def _limit(limit: int | None, full: bool) -> int | None:
    """``--limit`` and ``--full`` as one number: 0 is all, ``None`` what fits."""
    if limit is not None:
        _check_least("--limit", limit, 0, "0 shows all tokens")
    if full and limit:
        raise InputError(f"--limit {limit} with --full, which shows all tokens: drop one of them")
    return 0 if full else limit


def _read_text(name: str | None) -> str:
    if name is None:
        return SAMPLE
    where = "standard input" if name == "-" else f"text file {name!r}"
    try:
        data = _read_bytes(name)
        if len(data) > MAX_TEXT:
            raise InputError(f"{where} has more than {MAX_TEXT:,} bytes: give a part of it")
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise InputError(f"{where} cannot be read ({reason}): give a readable file") from error
    if not text:
        raise InputError(f"{where} is empty: give a text of at least one character")
    return text


def _read_bytes(name: str) -> bytes:
    """At most one byte too many; some files have no end."""
    if name == "-":
        return sys.stdin.buffer.read(MAX_TEXT + 1)
    with Path(name).open("rb") as file:
        return file.read(MAX_TEXT + 1)


def _status(what: str) -> Status:
    """Shown while something takes long; silent without a terminal."""
    return Console(stderr=True).status(what)


def _load_tokenizer(model: str) -> Any:
    remedy = "give a folder that holds tokenizer.json, or a name on the Hugging Face Hub"
    if Path(model).is_file():
        raise InputError(f"model {model!r} is a file: give the folder that holds it")
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not model or (is_path and not Path(model).is_dir()):
        raise InputError(f"model {model!r} is no folder: {remedy}")
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports every retry
    try:
        with _status("loading the tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # what transformers raises differs by version and by file
        reason = _first_line(error)
        raise InputError(
            f"model {model!r} has no tokenizer to load ({reason}): {remedy}"
        ) from error


@contextmanager
def _output() -> Iterator[Console]:
    """Standard output; what its encoding lacks is replaced, and a write that fails is reported."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield Console()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # typer leaves quietly
        raise
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise _exit(
            f"standard output cannot be written ({reason}): give it a place with room", 2
        ) from None


def _write(path: Path, page: str, text: str | None) -> None:
    if text not in (None, "-") and path.exists() and path.samefile(text):
        raise InputError(f"--html {str(path)!r} is the text itself: give another file")
    try:
        path.write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise InputError(
            f"--html {str(path)!r} cannot be written ({reason}): give a file in a folder that "
            "exists"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")


def _exit(message: str, code: int) -> typer.Exit:
    """Say ``message`` on standard error; the caller raises what it gets."""
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    line = visible_text(" ".join(message.splitlines()))
    with suppress(OSError):  # the status still says it
        typer.echo(f"vllm-sepllm: {line}", err=True)
    return typer.Exit(code)
