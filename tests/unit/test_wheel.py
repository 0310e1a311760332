"""What people install: every module is in the wheel, which runs where nothing else is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
SOURCES = {"vllm_sepllm": ROOT / "vllm_sepllm", "sepllm_kernels": ROOT / "kernels/sepllm_kernels"}
WITHOUT_DEPENDENCIES = (
    "vllm_sepllm",
    "vllm_sepllm.engine.names",
    "vllm_sepllm.engine.registration",
    "vllm_sepllm.evaluation.facts",
    "vllm_sepllm.option_names",
    "vllm_sepllm.presets",
    "vllm_sepllm.samples",
    "vllm_sepllm.separator_lists",
    "vllm_sepllm.token_texts",
    "sepllm_kernels",
)


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: building leaves files beside the sources."""
    pytest.importorskip("setuptools", reason="needs setuptools, to build the wheel")
    copy, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("vllm_sepllm", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"
    run(*pip, "--no-index", "-w", folder, copy)
    [found] = folder.glob("*.whl")
    return found


def test_every_module_is_in_the_wheel(wheel):
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*.py")
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert "vllm_sepllm/py.typed" in names
    folder = SOURCES["vllm_sepllm"]
    parts = {path.relative_to(folder).as_posix() for path in (folder / "cli/page").iterdir()}
    assert len(parts) > 3
    assert {f"vllm_sepllm/{part}" for part in parts} <= names


def test_it_works_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    program = f"import {', '.join(WITHOUT_DEPENDENCIES)}; print(vllm_sepllm.__file__)"
    shown = run(python, "-c", program, env=environment, cwd=tmp_path)
    assert shown.startswith(str(tmp_path))
    entry_points = (
        "from importlib.metadata import entry_points\n"
        "for group in ('vllm.general_plugins', 'vllm.platform_plugins', 'console_scripts'):\n"
        "    [entry] = [e for e in entry_points(group=group) if e.name.endswith('sepllm')]\n"
        "    print(entry.value)\n"
    )
    shown = run(python, "-c", entry_points, env=environment, cwd=tmp_path).split()
    assert shown == [
        "vllm_sepllm.engine.registration:register",
        "vllm_sepllm.engine.registration:platform",
        "vllm_sepllm.cli.main:app",
    ]
