"""The benchmark itself runs, and its rows are right, on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from batches import DEVICE

pytestmark = pytest.mark.kernels

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_smoke(monkeypatch, capsys, tmp_path):
    file = tmp_path / "gpu.json"
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(file)])
    import gpu

    gpu.main()  # leaves with a status if a row is wrong
    found = json.loads(file.read_text())
    assert found["is_complete"]
    rows = {row["op"]: row for row in found["results"]}
    assert list(rows) == ["decode", "overhead", "all kept", "FP8 pages", "prefill"]
    for name, row in rows.items():
        assert row["counts"]
        dense = row.get("dense_ms", {})
        assert dense.keys() >= ({"torch SDPA"} if name in ("decode", "prefill") else set())
    assert capsys.readouterr().out.count("error") >= 4


def test_a_run_that_is_stopped_leaves_its_rows(monkeypatch, tmp_path):
    file = tmp_path / "gpu.json"
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--output", str(file)])
    import gpu

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_overhead", stop)
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    found = json.loads(file.read_text())
    assert not found["is_complete"]
    assert [row["op"] for row in found["results"]] == ["decode"]


@pytest.mark.parametrize(("content", "shown"), [(0.0, "1.0e+00"), (torch.nan, "nan")])
def test_a_dense_kernel_that_is_wrong_is_no_comparison(monkeypatch, capsys, content, shown):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    def prepare(query, key, value, page):
        return lambda: torch.full_like(query, content)

    monkeypatch.setattr(gpu, "DENSE_KERNELS", {"wrong": prepare})
    case = gpu.make_case(gpu.SMOKE, 320, 2, 1, DEVICE)
    assert gpu.run_dense(case, gpu.call_once) == {}
    assert f"wrong: ValueError: relative error {shown}" in capsys.readouterr().out


def test_a_prompt_of_which_a_part_is_left_out_does_not_count(monkeypatch):
    """Whatever was in the memory before."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu
    import gpu_tune

    whole = gpu.kept_prefill_paged

    def half(query, pages, batch, output, scale):
        right = torch.empty_like(output)
        whole(query, pages, batch, right, scale)
        output[len(output) // 2 :] = right[len(output) // 2 :]

    case = gpu.make_case(gpu.SMOKE, 320, 1, 320, DEVICE)
    assert gpu.run_prefill(case, gpu.call_once, False)["relative_error"] < gpu.WRONG
    monkeypatch.setattr(gpu, "kept_prefill_paged", half)
    measured = gpu_tune.measure(lambda: gpu.run_prefill(case, gpu.call_once, False))
    assert measured == {"failed": "relative error nan"}


def test_tuning(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    file = tmp_path / "gpu_tune.json"
    monkeypatch.setattr(sys, "argv", ["gpu_tune.py", "--smoke", "--output", str(file)])
    import gpu_tune

    few = {"TILES": (64, 32), "WARPS": (4, 8), "STAGES": (5,), "PROGRAMS": (4,), "ROWS": (128,)}
    few["PACKED_STAGES"] = (2,)
    for name, values in few.items():
        monkeypatch.setattr(gpu_tune, name, values)
    gpu_tune.main()
    lines = capsys.readouterr().out.splitlines()
    for operation in ("decode", "decode, FP8 pages", "prefill", "prefill, FP8 pages", "packed"):
        found = [line for line in lines if line.startswith(f"{operation:18} ")]
        assert found
        assert all(line.endswith(" 1.0000 ms") for line in found), found  # right, that is
    assert len(json.loads(file.read_text())["results"]) == len(lines) - 1
