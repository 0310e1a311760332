"""The copies into staging pages are compiled, wherever the package lies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO)  # vLLM sets it up with its configuration
import numpy as np
import vllm_sepllm
from vllm_sepllm.engine.cpu.staging import merge_pages

print(vllm_sepllm.__file__)
entry_of = np.array([0, 0, 1, 1], dtype=np.int16)
flat = np.array([[[1, 2, 3, 4]], [[5, 6, 7, 8]], [[0, 0, 0, 0]]], dtype=np.int16)
head, tail, split = np.array([0]), np.array([1]), np.array([1])
merge_pages(flat, 2, head, tail, split, entry_of)
print(flat[2, 0].tolist())
print(merge_pages.stats.cache_path)
"""


def test_numba_does_without_a_cache_where_it_can_write_none(tmp_path):
    """A file where each directory of the cache would be stops the administrator too."""
    shutil.copytree(
        ROOT / "vllm_sepllm", tmp_path / "vllm_sepllm", ignore=lambda *_: ["__pycache__"]
    )
    (tmp_path / "vllm_sepllm/engine/cpu/__pycache__").touch()
    (tmp_path / "file").touch()
    environment = {
        **os.environ,
        "HOME": str(tmp_path / "file"),
        "XDG_CACHE_HOME": str(tmp_path / "file"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    source, merged, cache_path = run.stdout.splitlines()[-3:]
    assert source.startswith(str(tmp_path))
    assert merged == "[5, 6, 3, 4]"
    assert cache_path == "None"
    assert (run.stdout + run.stderr).count("numba finds no writable directory") == 1


def test_numba_keeps_what_it_compiled():
    from vllm_sepllm.engine.cpu.staging import merge_pages

    assert merge_pages.stats.cache_path is not None
