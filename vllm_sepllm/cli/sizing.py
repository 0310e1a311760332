"""``vllm-sepllm size``: what fits into a KV cache, before anything is started."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from vllm_sepllm.cli.common import (
    InputError,
    check_least,
    check_model,
    engine_options,
    exit_with,
    first_line,
    output,
    parse_options,
)
from vllm_sepllm.cli.inspection import visible_text
from vllm_sepllm.config import ConfigError
from vllm_sepllm.planning import read_planning_text

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(given: str) -> int:
    """``"24GiB"`` in bytes.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", given)
    unit = found and UNITS.get(found[2].upper().removesuffix("B") + "B" if found[2] else "")
    size = float(found[1]) * unit if found and unit else 0.0
    if not 1 <= size < 2**63:
        raise InputError(
            f"--memory {given!r}: must be a size such as 24GiB, 24GB, 512MiB or a number of bytes"
        )
    return int(size)


def size(
    model: Annotated[str, typer.Option(help="Folder or name of the model: config and tokenizer.")],
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory of the KV cache on each rank, e.g. 24GiB: what vLLM's "
            "--kv-cache-memory-bytes says, not that of the whole GPU.",
        ),
    ],
    context: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="As vLLM's --max-model-len.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="UTF-8 text like those to be served (planning_text)."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="KEY=VALUE", help="SepLLM option, e.g. -o window_size=64."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Argument of vLLM, e.g. --engine tensor_parallel_size=2."
        ),
    ] = None,
) -> None:
    """Say how many requests fit into a KV cache, beside full attention, and start nothing."""
    try:
        check_model(model, "give a folder that holds config.json, or a name on the Hub")
        options = _options(option, text)
        arguments = {**engine_options(engine), "model": model, "dtype": dtype}
        for name, instead in (
            ("max_model_len", "--context"),
            ("kv_cache_memory_bytes", "--memory"),
        ):
            if name in arguments:
                raise InputError(f"--engine {name}: is {instead} here; give that")
        if context is not None:
            check_least("--context", context, 1, "it is the longest request, in tokens")
            arguments["max_model_len"] = context
        found = _sizes(arguments, options, parse_memory(memory))
    except (InputError, ConfigError) as error:
        raise exit_with(str(error), 2) from None
    with output() as console:
        console.print(_table(found))
        plan = found.plan
        console.print(
            visible_text(
                f"Memory is planned for {plan.share:.1%} kept ({plan.source}), "
                f"{plan.planned_share:.1%} with its margin."
            )
        )
        console.print(
            "A request holds the most pages while its prompt is computed; vLLM's log takes each "
            "for one of these.",
        )


def _options(given: list[str] | None, text: str | None) -> dict[str, Any]:
    """SepLLM's, with the text that memory is planned for."""
    options = parse_options(given or [])
    if text is None:
        return options
    if "planning_text" in options:
        raise InputError("--text with -o planning_text: drop one of them")
    if text == "-":
        raise InputError("--text -: start-up reads it again, so give a file")
    try:
        read_planning_text(text)
    except ConfigError as error:
        raise InputError(str(error).replace("planning_text=", "--text ", 1)) from None
    return {**options, "planning_text": text}


def _sizes(arguments: dict[str, Any], options: dict[str, Any], memory: int) -> Any:
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
        from vllm_sepllm.engine.in_process import sentence_of
        from vllm_sepllm.engine.sizing import sizes
    except ImportError as error:
        raise exit_with(
            f"vLLM cannot be imported ({first_line(error)}): install it with pip install "
            "'vllm-sepllm[cpu]' or 'vllm-sepllm[cuda]'",
            1,
        ) from None
    try:
        return sizes(arguments, options, memory)
    except ValueError as error:  # vLLM's and ours have sentences
        raise InputError(sentence_of(error)) from error
    except Exception as error:  # what else is raised differs by model and by option
        raise InputError(
            f"the configuration of model {arguments['model']!r} cannot be read "
            f"({type(error).__name__}: {first_line(error)}): see whether vllm serve starts with it"
        ) from error


def _table(found: Any) -> Table:
    columns = {
        "SepLLM": found.sepllm,
        "full attention": found.full,
        "full attention, FP8": found.full_fp8,
    }
    table = Table(f"requests of {found.length:,} tokens", header_style="bold")
    for name in columns:
        table.add_column(name, justify="right")
    decoding = {n: (c.num_pages - 1) / c.pages_decoding if c else 0.0 for n, c in columns.items()}
    full = decoding["full attention"]
    rows: dict[str, Callable[[str, Any], str]] = {
        "pages of the KV cache": lambda _, c: f"{c.num_pages:,}",
        "tokens of a page": lambda _, c: f"{c.page_size}",
        "pages of a request at most": lambda _, c: f"{c.pages_per_request:,}",
        "at once, as vLLM logs it": lambda _, c: f"{c.concurrency:,.2f}",
        "pages while it decodes": lambda _, c: f"{c.pages_decoding:,}",
        "MiB while it decodes": lambda _, c: f"{c.bytes_decoding / 2**20:,.1f}",
        "requests decoding at once": lambda name, _: f"{decoding[name]:,.2f}",
        "beside full attention": lambda name, _: f"{decoding[name] / full:.2f}x" if full else "",
    }
    for i, (title, cell) in enumerate(rows.items()):
        no_room = "no room for one" if i == 0 else ""
        cells = (cell(name, c) if c else no_room for name, c in columns.items())
        table.add_row(title, *cells)
    return table
