"""What the commands share: errors of one sentence, and what is read from files and printed."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.status import Status

from vllm_sepllm.cli.inspection import visible_text
from vllm_sepllm.config import ConfigError

OURS = (
    *("attention_backend", "additional_config", "model", "dtype", "tokenizer", "revision"),
    *("hf_overrides", "enable_prefix_caching"),
)
LOCK = ".lock"  # file of a folder; held by the run that writes there
_NOT_OF_FILES = errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE
MAX_TEXT = 2**23  # bytes; more takes minutes and gigabytes to cut into tokens


class InputError(ValueError):
    """Something given on the command line cannot be used; one sentence says what and why."""


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


def engine_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM`` beside those that a command sets.

    Raises:
        InputError: one of them would change what is compared.
    """
    found = parse_options(pairs or [])
    for name in found:
        if name in OURS:
            raise InputError(
                f"--engine {name}: is set by this command, or has an option of its own; drop it"
            )
    ranks = found.get("tensor_parallel_size", 1)
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise InputError(
            f"--engine tensor_parallel_size={ranks!r}: must be a number of ranks, at least 1"
        )
    return found


def most_of_a_request(arguments: dict[str, Any], max_length: int) -> int:
    """Tokens of a request at most: those of the model, or fewer if ``max_model_len`` says so.

    Raises:
        InputError: it is no number of tokens.
    """
    given = arguments.get("max_model_len", max_length)
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise InputError(
            f"--engine max_model_len={given!r}: must be a whole number of tokens, at most "
            f"{max_length}"
        )
    return min(given, max_length)


@contextmanager
def values_refused(before: str = "") -> Iterator[None]:
    """What is wrong with values is reported behind ``before``.

    Raises:
        InputError: in the place of another ``ValueError``.
        ConfigError: as it is.
    """
    try:
        yield
    except (InputError, ConfigError):
        raise
    except ValueError as error:
        raise InputError(f"{before}{error}") from error


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """A folder that only this run writes to, made if it is not there.

    Raises:
        InputError: it cannot be made or written to, or another run writes to it.
    """
    make_folder(folder)
    try:
        with (folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--output {str(folder)!r}: another run writes to it; wait for that, or give "
                    "another folder"
                ) from None
            yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        if error.errno in _NOT_OF_FILES:
            raise InputError(f"the system refused something ({reason}): try again later") from error
        raise InputError(
            f"--output {str(folder)!r} cannot be written ({reason}): give a folder with room that "
            "can be written to"
        ) from error


def check_least(name: str, value: float, least: int, remedy: str) -> None:
    """Refuse a number below ``least`` with an :class:`InputError`."""
    if not value >= least:  # nor is nan
        raise InputError(f"{name} {value}: must be at least {least}; {remedy}")


def read_text(name: str) -> str:
    """A file, or with "-" standard input.

    Raises:
        InputError: it cannot be read, is no UTF-8, is empty or larger than :data:`MAX_TEXT`.
    """
    where = "standard input" if name == "-" else f"text file {name!r}"
    try:
        data = _read_bytes(name)
        if len(data) > MAX_TEXT:
            raise InputError(f"{where} has more than {MAX_TEXT:,} bytes: give a part of it")
        text = data.decode("utf-8").removeprefix("\ufeff")  # a mark of Notepad's, no text
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv"
        ) from error
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{where} cannot be read ({reason}): give a readable file") from error
    if not text:
        raise InputError(f"{where} is empty: give a text of at least one character")
    return text


def _read_bytes(name: str) -> bytes:
    """At most one byte too many; some files have no end."""
    if name == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed: give a file, or a pipe")
        return sys.stdin.buffer.read(MAX_TEXT + 1)
    with Path(name).open("rb") as file:
        return file.read(MAX_TEXT + 1)


def status(what: str) -> Status:
    """Shown while something takes long; silent without a terminal."""
    return Console(stderr=True).status(what)


def check_model(model: str, remedy: str) -> None:
    """Refuse what is neither a folder nor can be a name on the Hub, with an :class:`InputError`
    that ends with ``remedy``."""
    try:
        is_file, is_folder = Path(model).is_file(), Path(model).is_dir()
    except OSError as error:
        raise InputError(f"model {model!r} cannot be read ({error.strerror}): {remedy}") from error
    if is_file:
        raise InputError(f"model {model!r} is a file: give the folder that holds it")
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    is_path &= "://" not in model  # vLLM knows others
    if not model or (is_path and not is_folder):
        raise InputError(f"model {model!r} is no folder: {remedy}")


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or of a name on the Hub.

    Raises:
        InputError: there is none.
    """
    remedy = "give a folder that holds tokenizer.json, or a name on the Hugging Face Hub"
    check_model(model, remedy)
    transformers = import_transformers()
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports every retry
    try:
        with status("loading the tokenizer"):
            return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # what transformers raises differs by version and by file
        reason = first_line(error)
        raise InputError(
            f"model {model!r} has no tokenizer to load ({reason}): {remedy}"
        ) from error


def import_transformers() -> Any:
    """The module.

    Raises:
        InputError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"transformers cannot be imported ({first_line(error)}): pip install "
            "'vllm-sepllm[eval]' brings it, and vLLM does"
        ) from error
    return transformers


def make_folder(folder: Path) -> None:
    """For what a command writes.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output {str(folder)!r} cannot be made ({error.strerror}): give a folder that can "
            "be written to"
        ) from error


@contextmanager
def output() -> Iterator[Console]:
    """Standard output; what its encoding lacks is replaced, and a write that fails is reported."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if os.environ.get("COLUMNS") == "0":  # with so many rich prints nothing
        del os.environ["COLUMNS"]
    try:
        yield Console()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # typer leaves quietly
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise exit_with(
            f"standard output cannot be written ({reason}): give it a place with room", 2
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")


def exit_with(message: str, code: int) -> typer.Exit:
    """Say ``message`` on standard error; the caller raises what it gets."""
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    line = visible_text(" ".join(message.splitlines()))
    with suppress(OSError):  # the status still says it
        typer.echo(f"vllm-sepllm: {line}", err=True)
    return typer.Exit(code)
