"""Fetch the Python code of a vLLM release without installing it; prints the folder it is in.

    python scripts/vllm_source.py 0.33.0
    python scripts/vllm_source.py 0.33.0 --over-installed --also orjson

The wheel is downloaded with pip, once, and unpacked to .cache without its compiled parts.
--over-installed adds the compiled CPU kernels of the vLLM that is installed, so that a release
can be tried before there is a CPU build of it, as long as the kernels it calls are the same;
--also names what it imports and the installed one does not need:

    PYTHONPATH=$(.venv/bin/python scripts/vllm_source.py 0.33.0 --over-installed --also orjson) \
      .venv/bin/pytest
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
SUFFIXES = {".py", ".json", ".jinja", ".txt", ""}  # code and the data that code reads
TIMEOUT_S = 300


class DownloadError(RuntimeError):
    """pip could not download the wheel."""


def download(version: str, folder: Path) -> Path:
    """The wheel of a release."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"vllm=={version}"]
    try:
        done = subprocess.run(pip + wanted, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DownloadError(f"no wheel of vLLM {version} within {TIMEOUT_S} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DownloadError(f"no wheel of vLLM {version}: {'; '.join(errors) or done.stderr}")
    return next(folder.glob("*.whl"))


def source(version: str) -> Path:
    """Folder that holds ``vllm/`` of a release.

    Raises:
        DownloadError: it is not in the cache and cannot be fetched.
    """
    target = CACHE / f"vllm-{version}"
    if target.is_dir():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        wheel = download(version, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if Path(n).suffix in SUFFIXES]
            archive.extractall(unpacked, names)
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        (unpacked / "wheel").write_text(f"{wheel.name} sha256:{digest}\n", encoding="utf8")
        os.replace(unpacked, target)  # at once: an interrupted run leaves nothing behind
    return target


def over_installed(version: str, also: list[str]) -> Path:
    """A copy of :func:`source` with the compiled kernels and the name of a CPU build."""
    target = CACHE / "-".join([f"vllm-{version}-over-installed", *also])
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed: run scripts/setup.sh first")
    with tempfile.TemporaryDirectory(dir=source(version).parent) as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(source(version), copy)
        for library in Path(spec.origin).parent.glob("*.so"):
            (copy / "vllm" / library.name).symlink_to(library)
        [info] = copy.glob("vllm-*.dist-info")
        metadata = info / "METADATA"
        text = re.sub(r"(?m)^Requires-Dist:.*\n", "", metadata.read_text(encoding="utf8"))
        metadata.write_text(text.replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1))
        if also:
            pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
            subprocess.run([*pip, "--no-deps", "--target", str(copy), *also], check=True)
        info.rename(copy / f"vllm-{version}+cpu.dist-info")  # vLLM reads "cpu" from its name
        os.replace(copy, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version")
    parser.add_argument("--over-installed", action="store_true")
    parser.add_argument("--also", nargs="*", default=[], metavar="PACKAGE")
    args = parser.parse_args()
    try:
        is_over = args.over_installed
        print(over_installed(args.version, args.also) if is_over else source(args.version))
    except DownloadError as error:
        raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
