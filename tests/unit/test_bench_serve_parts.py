"""What ``benchmarks/serve.py`` sends, when it stops, and what it makes of its figures."""

import gzip
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from helpers import ROOT
from rich.console import Console

pytestmark = pytest.mark.unit

METRICS = """# HELP vllm:num_preemptions_total Preemptions.
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 4.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
vllm:sepllm_pages_returned_total{engine="0",group="kept",model_name="m"} 5.0
vllm:sepllm_pages_returned_total{engine="0",group="window",model_name="m"} 6.0
python_info{version="3"} 1.0
"""


@pytest.fixture(scope="module", autouse=True)
def _path():
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    pytest.importorskip("transformers", reason="needs transformers")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def backend():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ROOT / "examples/models/pg19-5m-sep/tokenizer.json"))


def books():
    return "".join(
        gzip.decompress((ROOT / f"benchmarks/data/{book}.txt.gz").read_bytes()).decode("utf8")
        for book in ("5396", "22424", "35205")
    )


def test_questions_of_a_document_share_it(backend):
    from serve_traces import Documents

    trace = Documents(count=3, tokens=400, questions=4, output_tokens=9)
    requests = trace.requests(backend)
    assert requests == trace.requests(backend)
    assert not set(requests) & set(trace.requests(backend, part=1))
    assert len(set(requests)) == 12
    passages = {request.prompt.split("\n\nQuestion: ")[0] for request in requests}
    assert len(passages) == 3
    text = books()
    for passage in passages:
        assert passage in text
        assert abs(len(backend.encode(passage).ids) - 400) < 8
    assert {request.output_tokens for request in requests} == {9}


def test_conversations_grow_in_rounds(backend):
    from serve_traces import Chat

    requests = Chat(users=4, turns=3, output_tokens=9).requests(backend)
    assert len(requests) == 12
    for before, after in zip(requests, requests[4:], strict=False):
        assert after.prompt.startswith(before.prompt)
    start = (ROOT / "benchmarks/data/dialogue.txt").read_text(encoding="utf8")
    assert all(request.prompt.startswith(start) for request in requests)


def test_short_problems_are_all_different(backend):
    from serve_traces import Short

    trace = Short(count=700, output_tokens=9)
    requests = trace.requests(backend) + trace.requests(backend, part=1)
    assert len({request.prompt for request in requests}) == 1400
    assert max(len(backend.encode(request.prompt).ids) for request in requests) < 256


def test_more_than_the_books_have(backend):
    from serve_traces import Documents

    trace = Documents(count=10, tokens=10_000, questions=1, output_tokens=9)
    with pytest.raises(ValueError, match="too short for part 7 of 100,000 tokens"):
        trace.requests(backend, part=7)


@pytest.mark.parametrize("name", ["llama", "smollm2", "demo"])
def test_requests_fit_their_model(backend, name):
    """The last part too, by the tokenizer that needs most tokens for these texts."""
    from serve import MOST_RATES
    from serve_cases import CASES, SMOKE

    case = {**CASES, **SMOKE}[name]
    for trace, _ in case.traces:
        requests = sorted(
            trace.requests(backend, MOST_RATES), key=lambda request: len(request.prompt)
        )
        for request in requests[-2:]:
            assert len(backend.encode(request.prompt).ids) + request.output_tokens < case.max_len


def test_requests_are_written_as_the_command_reads_them(tmp_path):
    from serve_traces import Request, write_requests

    write_requests(tmp_path / "a.jsonl", [Request("Two\nlines \u00fc", 7), Request("b", 8)])
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "Two\nlines \u00fc", "output_tokens": 7},
        {"prompt": "b", "output_tokens": 8},
    ]


def sweep(capacity, is_single=False):
    """Rates that are measured of a server that answers so many requests per second at most."""
    from serve import next_rate

    points = []
    while (rate := next_rate(points, 0.5, is_single)) is not None:
        answered = capacity if rate == "inf" else min(capacity, 0.9 * rate)
        points.append({"rate": rate, "requests_per_second": answered})
    return [point["rate"] for point in points]


def test_rates_double_until_saturation():
    assert sweep(3.0) == [0.5, 1, 2, 4, 8, "inf"]
    assert sweep(0.3) == [0.5, 1, "inf"]
    assert sweep(0.1) == [0.5, "inf"]
    assert sweep(3.0, is_single=True) == [0.5]
    assert len(sweep(1e9)) == 9


def test_every_rate_has_its_part():
    from serve import part

    assert [part(rate, 0.5) for rate in sweep(1e9)] == list(range(9))
    assert part("inf", 0.25) == 8


def test_metrics_are_summed_over_engines():
    from serve_process import read_metrics, total

    metrics = read_metrics(METRICS)
    assert metrics == {
        "vllm:num_preemptions_total": 7,
        "vllm:sepllm_pages_returned_total{group=kept}": 5,
        "vllm:sepllm_pages_returned_total{group=window}": 6,
    }
    assert total(metrics, "vllm:sepllm_pages_returned_total") == 11


def point(way, rate, answered, ttft):
    return {
        **{"model": "llama", "way": way, "trace": "chat", "rate": rate, "failed": 0},
        **{"requests_per_second": answered, "output_tokens_per_second": 10 * answered},
        **{"ttft_p99_ms": ttft, "tpot_p99_ms": 5.0, "running_max": 4, "preemptions": 0},
        **{"prefix_hit_rate": 0.5, "seconds": 20.0},
    }


@pytest.fixture
def content():
    from serve_cases import CASES

    ours = [(1, 1.0, 100), (2, 2.0, 200), (4, 3.0, 900), ("inf", 3.1, 5000)]
    full = [(1, 1.0, 150), (2, 1.5, 800), ("inf", 1.5, 9000)]
    points = [point("SEPLLM", *each) for each in ours] + [point("CPU_ATTN", *each) for each in full]
    return {"settings": {"llama": CASES["llama"].about(is_cuda=False)}, "points": points}


def test_latencies_are_compared_at_rates_of_both(content):
    from serve_report import compare, select

    by_way = {way: select(content["points"], way=way) for way in ("SEPLLM", "CPU_ATTN")}
    found = {name: values for name, _, values in compare(by_way)}
    assert found["requests/s, at most"] == [3.1, 1.5]
    assert found["TTFT P99, ms, at 1/s"] == [100, 150]
    assert found["TTFT P99, ms, at 2/s"] == [200, 800]


def test_table_and_plot(content, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from serve_report import line, plot, show

    show(content, Console(width=100))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "2.07" in out  # 3.1 over 1.5
    plot(content, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 200_000
    assert "FAILED" not in line(content["points"][0])
    assert "2 FAILED" in line({**content["points"][0], "failed": 2})


def test_a_run_goes_on_where_it_was_stopped(content, tmp_path):
    from serve import Results

    path, about = tmp_path / "a.json", {"date": "today", "commit": "abc"}
    Results(path, about, is_fresh=False).add(content["points"][0])
    assert len(Results(path, {**about, "date": "later"}, is_fresh=False).points()) == 1
    assert not Results(path, {**about, "commit": "def"}, is_fresh=False).points()
    assert not Results(path, about, is_fresh=True).points()
    Results(path, about, is_fresh=False).end()
    assert not Results(path, about, is_fresh=False).points()


def test_a_model_that_is_not_there_is_left_out(capsys):
    from serve import available
    from serve_cases import CASES

    cases = {**CASES, "smollm2": replace(CASES["smollm2"], model="build/models/nowhere")}
    assert list(available(cases, Console(width=200))) == ["llama"]
    assert "no build/models/nowhere, which `make model` fetches" in capsys.readouterr().out


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    from serve_process import Server, ServerError

    (tmp_path / "vllm").write_text("#!/bin/sh\necho Address already in use\nexit 1\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    server = Server("model", [], tmp_path / "log")
    with pytest.raises(ServerError, match=r"(?s)ended at its start.*Address already in use"):
        server.__enter__()


def test_a_server_is_ended_with_what_it_started(tmp_path):
    """By the signal that ends the benchmark too."""
    (tmp_path / "vllm").write_text("#!/bin/sh\nsleep 600 & echo $!; wait\n")
    (tmp_path / "vllm").chmod(0o755)
    code = f"""
import signal, sys
sys.executable = {str(tmp_path / "python")!r}
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
from serve_process import Server
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("begun", flush=True)
Server("model", [], Path({str(tmp_path / "log")!r})).__enter__()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        log = tmp_path / "log"
        while not (log.exists() and log.read_text().strip()):
            assert process.poll() is None
        child = int(log.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    psutil = pytest.importorskip("psutil", reason="needs psutil")
    deadline = time.monotonic() + 60  # it was killed; who collects it is up to the machine
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_turns_are_compared_round_by_round(capsys):
    """A slow minute slows both servers of a round down, so ratios are those of rounds."""
    import serve_turns

    answered = {"a": [2.0, 1.0, 4.0], "b": [1.0, 0.5, 1.0]}
    points = [
        {"model": "m", "trace": "chat", "way": way, "round": i, "requests_per_second": each[i]}
        for i in range(3)
        for way, each in sorted(answered.items(), reverse=bool(i % 2))
    ]
    other = {"model": "m", "trace": "short", "way": "a", "round": 0, "requests_per_second": 9.0}
    found = serve_turns.rates([*points, other], "m", "chat")
    assert found == answered
    assert serve_turns.ratios(answered) == [2.0, 2.0, 4.0]
    settings = {"m": {"traces": ["chat", "short"], "ways": ["a", "b"]}}
    serve_turns.show({"points": [*points, other], "settings": settings}, Console(width=100))
    [row] = [line for line in capsys.readouterr().out.splitlines() if "chat" in line]
    assert row.replace("│", " ").split() == [
        *["m", "chat", "a", "/", "b", "2.00", "/", "1.00", "2.00", "2.00", "4.00"]
    ]
