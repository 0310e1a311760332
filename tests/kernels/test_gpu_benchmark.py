"""The benchmark itself runs, and its rows are right, on tiny shapes."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_smoke(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke"])
    import gpu

    gpu.main()  # leaves with a status if a row is wrong
    out = capsys.readouterr().out
    for operation in ("decode", "overhead", "all kept", "prefill"):
        assert f"\n{operation} " in f"\n{out}"
