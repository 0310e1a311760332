"""What a file of results says of itself, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def provenance(*packages: str) -> dict[str, Any]:
    """Date, commit and versions."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "versions": {name: _version(name) for name in packages},
    }


def processor() -> dict[str, Any]:
    """The processor, and which cores this process may use."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "features": sorted(set(flags) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """``None`` where the sources came without their history, or there is no git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path, found: dict[str, Any]) -> None:
    """Replaces what was there in one step, so that a file is never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf8")
    partial.replace(path)
