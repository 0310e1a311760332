"""`benchmarks/serve.py --smoke` as `make bench-serve` runs it: what it writes holds together."""

import json
import subprocess
import sys

import psutil
import pytest
from helpers import ROOT
from serving import environment

pytestmark = pytest.mark.e2e

REQUESTS = {"documents": 12, "chat": 9, "short": 12}
OUTPUT_TOKENS = {"documents": 24, "chat": 16, "short": 16}


def bench(*options, output):
    command = [sys.executable, "benchmarks/serve.py", "--smoke", "--output", str(output), *options]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=500
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "serve.json"
    result = bench(output=path)
    assert result.returncode == 0, result.stdout + result.stderr
    return path


@pytest.fixture(scope="module")
def points(output):
    content = json.loads(output.read_text())
    assert content["is_whole"]
    found = {(point["way"], point["trace"]): point for point in content["points"]}
    assert len(found) == len(content["points"]) == 6
    return found


@pytest.mark.parametrize("trace", REQUESTS)
@pytest.mark.parametrize("way", ["SEPLLM", "CPU_ATTN"])
def test_all_requests_are_answered(points, way, trace):
    point = points[way, trace]
    assert point["completed"] == point["requests"] == REQUESTS[trace]
    assert point["failed"] == 0
    assert point["output_tokens"] == REQUESTS[trace] * OUTPUT_TOKENS[trace]
    assert point["generated_tokens"] == point["output_tokens"]  # the server's count
    assert point["prompt_tokens"] == points["CPU_ATTN", trace]["prompt_tokens"]
    for metric in ("ttft", "tpot", "e2el"):
        assert 0 < point[f"{metric}_median_ms"] <= point[f"{metric}_p99_ms"]


def test_prefixes_are_found_where_there_are_any(points):
    """Whether a question about a document finds it depends on when it comes."""
    for way in ("SEPLLM", "CPU_ATTN"):
        assert points[way, "chat"]["prefix_hit_rate"] > 0.1
        assert points[way, "short"]["prefix_hit_rate"] < 0.1


def test_what_the_plugin_counts(points):
    """Only a server with SepLLM has its counters."""
    assert not points["CPU_ATTN", "documents"]["sepllm"]
    counted = points["SEPLLM", "documents"]["sepllm"]
    assert counted["tokens_kept_total"] > 0
    assert counted["tokens_dropped_total"] > 0
    assert counted["request_kept_share_count"] == REQUESTS["documents"]
    assert "planned_kept_share" not in counted


def test_it_says_where_it_was_measured(output):
    content = json.loads(output.read_text())
    assert content["cpu"]
    assert content["date"]
    options = content["settings"]["demo"]["options"]
    assert options[options.index("--kv-cache-memory-bytes") + 1] == str(10 << 20)
    assert output.with_suffix(".png").stat().st_size < 200_000


def test_the_report_measures_nothing(output):
    before = output.read_bytes()
    result = bench("--report", output=output)
    assert result.returncode == 0, result.stderr
    assert "TTFT P99, ms, at 4/s" in result.stdout
    assert output.read_bytes() == before
    absent = bench("--report", output=output.with_name("absent.json"))
    assert absent.returncode == 2
    assert "leave out --report to measure" in absent.stderr


def test_no_server_is_left(output):
    left = [p for p in psutil.process_iter(["cmdline"]) if _is_of_the_bench(p.info["cmdline"])]
    assert not left


def _is_of_the_bench(command):
    line = " ".join(command or ())
    return "vllm serve" in line and f"--kv-cache-memory-bytes {10 << 20} " in line
