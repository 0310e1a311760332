"""``vllm-sepllm tune``: options for a model, a text and a share of the KV cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_sepllm.cli.common import (
    InputError,
    check_least,
    engine_options,
    exit_with,
    load_tokenizer,
    make_folder,
    output,
    read_text,
    status,
)
from vllm_sepllm.cli.evaluate import read_model
from vllm_sepllm.config import ConfigError

if TYPE_CHECKING:
    from vllm_sepllm.evaluation.run import Evaluation
    from vllm_sepllm.evaluation.search import Candidate, Score
    from vllm_sepllm.evaluation.tune import Tuned


def tune(
    model: Annotated[str, typer.Option(help="Folder or name of the model.")],
    kv: Annotated[float, typer.Option(help="Share of the KV cache, e.g. 0.3.")],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="UTF-8 text; may be repeated. Default: a novel."),
    ] = None,
    keep_retrieval: Annotated[
        bool, typer.Option("--keep-retrieval", help="Facts far back come before perplexity.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Time for the search.")] = 15,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "float32",
    engine: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Argument of vLLM's LLM.")
    ] = None,
    folder: Annotated[Path, typer.Option("--output", help="Folder for what was measured.")] = Path(
        "sepllm-tune"
    ),
) -> None:
    """Search the options that lose least, for a share of the KV cache.

    What was measured is kept in the folder: the same command goes on, with more time if given.
    """
    try:
        if not 0 < kv < 1:
            raise InputError(f"--kv {kv:g}: must be above 0 and below 1, e.g. 0.3")
        check_least("--minutes", minutes, 0, "15 is enough for a small model on a CPU")
        arguments = engine_options(engine)
        evaluation, tokenizer = _prepare(model, tuple(text or ()), dtype, arguments, folder)
        tuned, failed, num_late = _search(evaluation, tokenizer, kv, keep_retrieval, 60 * minutes)
    except (InputError, ConfigError) as error:
        raise exit_with(str(error), 2) from None
    except KeyboardInterrupt:
        raise exit_with("stopped; the same command goes on where it was", 130) from None
    with output() as console:
        _show(console, tuned, failed, num_late)


def _prepare(
    model: str, names: tuple[str, ...], dtype: str, arguments: dict[str, Any], folder: Path
) -> tuple[Evaluation, Any]:
    """What candidates are measured on, and the tokenizer.

    Raises:
        InputError: something cannot be used.
    """
    from vllm_sepllm.evaluation.material import make_material, package_text
    from vllm_sepllm.evaluation.run import Evaluation, engine_arguments
    from vllm_sepllm.evaluation.tune import SUITE

    tokenizer, read = load_tokenizer(model), read_model(model)
    texts = [read_text(name) for name in names] or [package_text()]
    try:
        with status("cutting texts into tokens"):
            suite = SUITE.within(read.max_length)
            material = make_material(tokenizer, texts, suite)
    except ValueError as error:
        raise InputError(str(error)) from error
    make_folder(folder)
    given = engine_arguments(read, suite.longest, dtype, arguments)
    return Evaluation(read, material, [], given, folder, {}), tokenizer


def _search(
    evaluation: Evaluation, tokenizer: Any, kv: float, by_questions: bool, seconds: float
) -> tuple[Tuned, dict[str, str], int]:
    """The result, what could not be served, and how many were left out.

    Raises:
        InputError: nothing was found.
    """
    from vllm_sepllm.evaluation.run import EvaluationError
    from vllm_sepllm.evaluation.searcher import Searcher
    from vllm_sepllm.evaluation.tune import tune as search

    with Searcher(evaluation, seconds) as searcher, status("starting") as shown:
        try:
            tuned = search(evaluation, searcher, tokenizer, kv, by_questions, shown.update)
        except (ValueError, EvaluationError) as error:
            raise InputError(str(error)) from error
        return tuned, searcher.failed, searcher.num_late


def _show(console: Console, tuned: Tuned, failed: dict[str, str], num_late: int) -> None:
    """Costs on text that was not searched on, and what to paste."""
    if tuned.layers:
        layers = ", ".join(f"{layer} ({nats:+.4f})" for layer, nats in tuned.layers[:6])
        console.print(f"What a layer loses alone, nats per token: {layers}", soft_wrap=True)
    console.print(_table("on text that the search did not see", tuned.reported))
    console.print(_table("on text that was searched on", tuned.best[:8]))
    for name, reason in failed.items():
        console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    if num_late:
        console.print(
            f"{num_late} measurements were left out for lack of time: give more --minutes"
        )
    for what, (one, _) in zip(("the best", "the runner-up"), tuned.best, strict=False):
        options = json.dumps({"sepllm": one.options})
        console.print(f"\n{what}: {one.name}", markup=False, soft_wrap=True)
        line = f"--attention-backend sepllm --additional-config '{options}'"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, rows: list[tuple[Candidate, Score]]) -> Table:
    table = Table("", "KV", "perplexity", "questions", title=title, title_justify="left")
    for one, score in rows:
        questions = f"{score.right} of {score.of}" if score.of else ""
        table.add_row(one.name, f"{one.share:.1%}", f"{score.perplexity:.2f}", questions)
    return table
