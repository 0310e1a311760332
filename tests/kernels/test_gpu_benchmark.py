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
    for operation in ("decode", "overhead", "all kept", "FP8 pages", "prefill"):
        assert f"\n{operation} " in f"\n{out}"


def test_tuning(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["gpu_tune.py", "--smoke"])
    import gpu_tune

    few = {"TILES": (64, 32), "WARPS": (4, 8), "STAGES": (5,), "PROGRAMS": (4,), "ROWS": (128,)}
    for name, values in few.items():
        monkeypatch.setattr(gpu_tune, name, values)
    gpu_tune.main()
    lines = capsys.readouterr().out.splitlines()
    for operation in ("decode", "decode, FP8 pages", "prefill", "prefill, FP8 pages"):
        found = [line for line in lines if line.startswith(f"{operation:18} TILE")]
        assert found
        assert all(line.endswith(" 1.0000 ms") for line in found), found  # right, that is
