"""``vllm-sepllm tune``: options for a model, a text and a share of the KV cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
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
    most_of_a_request,
    output,
    read_text,
    status,
    values_refused,
    written_to,
)
from vllm_sepllm.cli.evaluate import read_model
from vllm_sepllm.config import ConfigError
from vllm_sepllm.evaluation.worker import write_json

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
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Try lists of the tokens most attended to from far.")
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
        parts = _parts(text or [], calibrate)
        evaluation, tokenizer = _prepare(model, parts[:2], dtype, arguments, folder)
        with written_to(folder):
            lists = _calibrated(evaluation, tokenizer, parts[2], dtype) if calibrate else {}
            tuned, failed, num_late = _search(
                evaluation, tokenizer, kv, keep_retrieval, 60 * minutes, lists
            )
            write_json(folder / "report.json", _as_json(tuned, kv, model))
    except (InputError, ConfigError) as error:
        raise exit_with(str(error), 2) from None
    except KeyboardInterrupt:
        raise exit_with("stopped; the same command goes on where it was", 130) from None
    with output() as console:
        _show(console, tuned, failed, num_late)


def _parts(names: Sequence[str], calibrate: bool) -> list[list[str]]:
    """Of every text: what is searched on, what is reported, and what lists are made from."""
    from vllm_sepllm.evaluation.material import package_text, split

    texts = [read_text(name) for name in names] or [package_text()]
    return [list(part) for part in zip(*(split(x, 2 + calibrate) for x in texts), strict=True)]


def _prepare(
    model: str, parts: Sequence[Sequence[str]], dtype: str, arguments: dict[str, Any], folder: Path
) -> tuple[Evaluation, Any]:
    """What candidates are measured on, and the tokenizer.

    Raises:
        InputError: something cannot be used.
    """
    from vllm_sepllm.evaluation.material import joined, longest_request, make_material
    from vllm_sepllm.evaluation.run import Evaluation, engine_arguments
    from vllm_sepllm.evaluation.tune import SUITE

    tokenizer, read = load_tokenizer(model), read_model(model)
    what = "of each part of the text, for search and report: "
    with values_refused(what), status("cutting texts into tokens"):
        most = most_of_a_request(arguments, read.max_length)
        suite = SUITE.within(most)
        material = joined(
            *(
                make_material(tokenizer, part, suite, number * suite.num_documents)
                for number, part in enumerate(parts)
            )
        )
        longest = longest_request(suite, material, most)
    given = engine_arguments(read, longest, dtype, arguments)
    return Evaluation(read, material, [], given, folder, {}), tokenizer


def _calibrated(
    evaluation: Evaluation, tokenizer: Any, texts: Sequence[str], dtype: str
) -> dict[str, dict[str, Any]]:
    """Rules with lists of what is attended to from far, by name.

    Raises:
        InputError: the model could not be looked at.
    """
    from vllm_sepllm.evaluation.calibration_worker import calibrate
    from vllm_sepllm.evaluation.child import EvaluationError
    from vllm_sepllm.evaluation.tune import CALIBRATED

    with status("looking at what is attended to from far"):
        try:
            found = calibrate(evaluation.model.name, tokenizer, texts, dtype, evaluation.folder)
        except (ValueError, EvaluationError) as error:
            raise InputError(str(error)) from error
    return {f"{CALIBRATED}, {share:.0%} of text": {"keep": keep} for share, keep in found}


def _search(
    evaluation: Evaluation,
    tokenizer: Any,
    kv: float,
    by_questions: bool,
    seconds: float,
    lists: dict[str, dict[str, Any]],
) -> tuple[Tuned, dict[str, str], int]:
    """The result, what could not be served, and how many were left out.

    Raises:
        InputError: nothing was found.
    """
    from vllm_sepllm.evaluation.child import EvaluationError
    from vllm_sepllm.evaluation.searcher import Searcher
    from vllm_sepllm.evaluation.tune import tune as search

    with Searcher(evaluation, seconds) as searcher, status("starting") as shown:
        try:
            tuned = search(evaluation, searcher, tokenizer, kv, by_questions, shown.update, lists)
        except (ValueError, EvaluationError) as error:
            raise InputError(str(error)) from error
        return tuned, searcher.failed, searcher.num_late


def _as_json(tuned: Tuned, kv: float, model: str) -> dict[str, Any]:
    """What is shown."""

    def rows(found: list[tuple[Candidate, Score]]) -> list[dict[str, Any]]:
        return [
            {"name": one.name, "kv": one.share, "options": one.options, **asdict(score)}
            for one, score in found
        ]

    return {
        "model": Path(model).resolve().name,
        "kv": kv,
        "reported": rows(tuned.reported),
        "searched": rows(tuned.best),
        "layers": tuned.layers,
        "calibrated": tuned.calibrated,
    }


def _show(console: Console, tuned: Tuned, failed: dict[str, str], num_late: int) -> None:
    """Costs on text that was not searched on, and what to paste."""
    if tuned.layers:
        layers = ", ".join(f"{layer} ({nats:+.4f})" for layer, nats in tuned.layers[:6])
        console.print(f"What a layer loses alone, nats per token: {layers}", soft_wrap=True)
    console.print(_table("on text that the search did not see", tuned.reported))
    console.print(_table("on text that was searched on", tuned.best[:8]))
    if tuned.calibrated:
        console.print(tuned.calibrated, soft_wrap=True)
    for name, reason in {**tuned.refused, **failed}.items():
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
