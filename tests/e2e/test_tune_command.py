"""``vllm-sepllm tune`` with engines: what it prints can be served, and a search goes on."""

import json
import re
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_sepllm.cli import main
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation import child, search, searcher
from vllm_sepllm.evaluation import tune as tuning
from vllm_sepllm.evaluation.material import Suite
from vllm_sepllm.evaluation.search import Rung

pytestmark = pytest.mark.e2e

FEW = "nothing (StreamingLLM)", "separators", "facts"


@pytest.fixture
def small(monkeypatch):
    """One short text and one document for the search, and as much for the report."""
    monkeypatch.setattr(tuning, "SUITE", Suite(1, 300, (400,), 1, 0))
    monkeypatch.setattr(tuning, "RUNGS", (Rung((0,), (0,)),))
    monkeypatch.setattr(tuning, "REPORTED", Rung((1,), (1,)))
    monkeypatch.setattr(tuning, "BOUNDS", (8,))
    monkeypatch.setattr(search, "RULES", {name: search.RULES[name] for name in FEW})


def test_a_search_and_its_repetition(small, monkeypatch, tmp_path, first_layers):
    """The second run has no time, and takes everything from the first."""
    started, start = [], child.subprocess.Popen

    def counted(command, **options):
        started.append(command[command.index("-m") + 1].rsplit(".", 1)[1])
        return start(command, **options)

    patched = SimpleNamespace(**{**vars(child.subprocess), "Popen": counted})
    monkeypatch.setattr(child, "subprocess", patched)
    _, model = first_layers(2)
    command = ["tune", "--model", model, "--kv", "0.5", "--keep-retrieval", "--calibrate"]
    command += ["--output", str(tmp_path / "out")]
    found = CliRunner().invoke(main.app, command, env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output + found.stderr
    assert started == ["calibration_worker", "search_worker"]
    printed = re.findall(r"--additional-config '(.*)'", found.output)
    assert len(printed) == 2, "the best and the runner-up"
    for options in printed:
        SepLLMConfig.from_dict(json.loads(options)["sepllm"])
    for name in ("full attention", "nothing (StreamingLLM), window", "newest 8"):
        assert name in found.output
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf8"))
    best = report["searched"]
    wins = best[0]["name"].startswith(tuning.CALIBRATED)
    assert ("A calibrated list is the best" in found.output) is wins
    assert wins or not any(one["name"].startswith(tuning.CALIBRATED) for one in best)
    assert [json.loads(options)["sepllm"] for options in printed] == [
        one["options"] for one in best[:2]
    ]
    assert len({json.dumps(one["options"]) for one in best}) == len(best)

    again = CliRunner().invoke(main.app, [*command, "--minutes", "0"], env={"COLUMNS": "200"})
    assert again.exit_code == 0, again.output + again.stderr
    assert again.output == found.output
    assert started[2:] == ["calibration_worker"]


def test_a_search_that_cannot_go_on(small, monkeypatch, tmp_path, first_layers):
    """The worker ends at its start; the sentence says why, and where more is."""
    _, model = first_layers(2)
    monkeypatch.setattr(searcher, "write_json", lambda path, found: path.write_text("{}\n"))
    command = ["tune", "--model", model, "--kv", "0.5", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(main.app, command)
    assert found.exit_code == 2, found.output
    assert "the search ended: KeyError: 'material'" in found.stderr
    assert "search.log" in found.stderr
