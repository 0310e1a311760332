"""The examples run as their first lines say. The server and its client: test_serve.py."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.e2e


def run(script):
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    result = subprocess.run(
        [sys.executable, f"examples/{script}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=env,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_offline():
    shown = run("offline.py")
    start = "It was late in the evening when she came back to the house, and"
    assert start in shown
    assert len(shown.split(start)[1].split()) > 10


def test_show_kept_tokens():
    shown = run("show_kept_tokens.py")
    last = shown.strip().splitlines()[-1]
    kept, _, total = last.split()[:3]
    assert last.endswith("%)")
    assert 0.1 < int(kept) / int(total) < 0.5
