"""`scripts/gpu_e2e.sh` runs to its table without a GPU, on tiny shapes. Nothing is timed here."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
from helpers import ROOT

pytestmark = pytest.mark.e2e


def run(results, limit=0, **env):
    # The engine runs in the process that measures it, by tests/support/environment.py.
    given = {"PYTHON": sys.executable, "BUNDLE": "none", "RESULTS": str(results)}
    env = {**os.environ, **given, **env}
    return subprocess.run(
        ["scripts/gpu_e2e.sh", str(limit)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=550,
    )


def test_smoke(tmp_path):
    """One engine was measured before time ran out, and the first of the other's two workloads."""
    names = "time_to_first_token", "inter_token_latency", "preemptions", "requests"
    row = {**dict.fromkeys(names, 0), "output_tokens_per_second": 123.0, "running_at_most": 0}
    row |= {"model": "smoke", "kv": "auto", "commit": "of an earlier call", "kv_usage_at_most": 0.5}
    for backend, done in (("SEPLLM", ["smoke"]), ("dense", ["smoke", "smoke, again"])):
        workloads = [{**row, "backend": backend, "name": name} for name in done]
        earlier = {"is_complete": len(done) == 2, "workloads": workloads}
        (tmp_path / f"run-smoke-{backend}-auto.json").write_text(json.dumps(earlier))
    done = run(tmp_path, SMOKE="1", MODES="eager")
    logs = {path.name: path.read_text()[-1500:] for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    assert "greedy tokens equal the reference's" in done.stdout
    found = json.loads((tmp_path / "gpu_e2e.json").read_text())
    [check] = found["checks"]
    assert check["prompts"] == 8
    assert check["cached_tokens"] > 1658 - 128, "nothing came from the prefix cache"
    assert {row["backend"] for row in found["results"]} == {"SEPLLM", "dense"}
    rates = {
        (row["backend"], row["name"]): row.pop("output_tokens_per_second")
        for row in found["results"]
    }
    assert rates.pop(("SEPLLM", "smoke, again")) != 123.0
    assert list(rates.values()) == [123.0] * 3
    for row in found["results"]:
        if (row["backend"], row["name"]) != ("SEPLLM", "smoke, again"):
            assert row["commit"] == "of an earlier call"
            continue
        assert row["commit"] != "of an earlier call"
        assert row["cached_tokens"] == 0
        assert row["running_at_most"] == row["requests"]
        assert 0 < row["kv_usage_at_most"] < 1
        assert row["preemptions"] == 0
        assert row["sepllm_ratio"] > 0
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run-*.json")}
    assert run(tmp_path, SMOKE="1", MODES="eager").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("run-*.json")} == finished


def test_wrong_tokens_stop_it(tmp_path):
    """A check that fails in every mode, here for want of vLLM, lets nothing be measured."""
    done = run(tmp_path, SMOKE="1", PYTHON="false")
    assert done.returncode == 1
    assert "nothing is measured" in done.stdout
    assert not list(tmp_path.glob("*.json"))


# Stands for python: the second argument says what to do, the third where results are.
STUB = """#!/bin/bash
echo "$2 ${*: -1}" >>"$3/calls"
case "$2 $*" in
  "check "*compiled) [[ -z $SLOW ]] || sleep 60
    printf 'ValueError: the cause\nSee root cause above.\n'; exit 1 ;;
  check*) touch "$3/check-${*: -1}.json" ;;
  "measure "*SEPLLM*) kill -KILL $$ ;;
  "measure "*) printf '"is_complete": true' >"$3/run-smoke-dense-auto.json" ;;
esac
"""


def test_what_failed_is_said_and_not_tried_again(tmp_path):
    """A mode that gave wrong tokens, and an engine that was killed with time to spare."""
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    for _ in range(2):
        done = run(tmp_path, SMOKE="1", PYTHON=str(stub))
        assert done.returncode == 1
        assert "check, compiled: failed" in done.stdout
        assert "check, graphs: greedy tokens equal" in done.stdout
        assert "smoke SEPLLM auto: failed" in done.stdout
        assert "no time left" not in done.stdout
        assert "the cause" in done.stdout
    calls = (tmp_path / "calls").read_text().split("\n")
    assert [calls.count(f"check {mode}") for mode in ("compiled", "graphs", "eager")] == [1, 1, 0]
    assert sum(call.startswith("measure") for call in calls) == 3  # one finished the first time


def test_a_mode_that_takes_too_long_has_failed(tmp_path):
    """The others still have time; results and logs are in an archive after every step."""
    stub, archive = tmp_path / "stub", tmp_path / "found.tar.gz"
    stub.write_text(STUB)
    stub.chmod(0o755)
    results = tmp_path / "results"
    given = {"CHECK_LIMIT": "5", "SLOW": "1", "ARCHIVE": str(archive), "KV_GIB": "50"}
    done = run(results, 120, SMOKE="1", PYTHON=str(stub), **given)
    assert "check, compiled: failed" in done.stdout
    assert "check, graphs: greedy tokens equal" in done.stdout
    with tarfile.open(archive) as found:
        assert {"./check-compiled.failed", "./run-smoke-SEPLLM-auto.log"} <= {*found.getnames()}
    assert not (tmp_path / "found.tar.gz.new").exists()
    assert "measure 50" in (results / "calls").read_text()
