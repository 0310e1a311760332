"""This project's code and the versions of vLLM it is compared with."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

from contract.source import Tree
from contract.usage import Usage

ROOT = Path(__file__).resolve().parents[2]
OWN = {
    "vllm_sepllm": ROOT / "vllm_sepllm",
    "sepllm_kernels": ROOT / "kernels" / "sepllm_kernels",
}


class NoSourceError(RuntimeError):
    """The source of a version is not at hand; says why."""


def installed_version() -> str:
    """Version of the installed vLLM, without its local part."""
    return version("vllm").partition("+")[0]


def _installed_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "vLLM is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def installed_tree() -> Tree:
    """The installed vLLM and our code."""
    return Tree({"vllm": _installed_folder(), **OWN})


@cache
def usage() -> Usage:
    """What the engine relies on. Types are taken from the installed version."""
    return Usage(installed_tree(), OWN["vllm_sepllm"] / "engine")


@cache
def released_folder(wanted: str) -> Path:
    """Folder with a released wheel's code, from the cache or downloaded.

    Raises:
        NoSourceError: it cannot be downloaded.
    """
    script = [sys.executable, str(ROOT / "scripts" / "vllm_source.py"), wanted]
    done = subprocess.run(script, capture_output=True, text=True)
    if done.returncode:
        raise NoSourceError(done.stderr.strip())
    return Path(done.stdout.strip())


def released_tree(wanted: str) -> Tree:
    """A version of vLLM and our code; the installed one is not downloaded."""
    if wanted == installed_version():
        return installed_tree()
    return Tree({"vllm": released_folder(wanted) / "vllm", **OWN})


def origin(wanted: str) -> str:
    """Where the source of a version was taken from."""
    if wanted == installed_version():
        return f"the installed vLLM {version('vllm')}"
    return (released_folder(wanted) / "wheel").read_text(encoding="utf8").strip()
