"""`vllm serve MODEL --attention-backend sepllm`, over HTTP, as a user starts it."""

import json
import socket
import subprocess
import sys
from itertools import pairwise

import pytest
from helpers import MODEL, ROOT
from serving import BIN, NAME, SMALL_POOL, check_concurrent, environment, kill_while_busy

from vllm_sepllm.engine.compat import vllm_version

pytestmark = pytest.mark.e2e


@pytest.fixture
def server(servers):
    return servers(*SMALL_POOL)


def test_one_line_says_what_is_active(server):
    log = server.log.read_text().splitlines()
    lines = [line for line in log if "INFO" in line and "SepLLM attention:" in line]
    assert len(lines) == 1
    for part in ("policy=sepllm", "4 sinks", "window of 64 tokens", "9 separator ids"):
        assert part in lines[0]
    for part in ("block size 32", f"vLLM {vllm_version()}"):
        assert part in lines[0]


def test_concurrent_requests_equal_the_reference(server, book, reference_model, separator_ids):
    check_concurrent(server, book, reference_model, separator_ids)


def test_streamed_chat_through_the_openai_client(server):
    """The example's text is the one the server gives without streaming."""
    message = "She opened the door, and there"
    command = [sys.executable, "examples/chat_client.py", message, "--base-url"]
    command += [f"{server.url}/v1", "--max-tokens", "30"]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment()
    )
    assert shown.returncode == 0, shown.stderr
    messages = [{"role": "user", "content": message}]
    whole = server.post("chat/completions", messages=messages, max_tokens=30)
    content = whole["choices"][0]["message"]["content"]
    assert content.strip()
    assert shown.stdout.strip() == content.strip()


def test_clients_that_leave_give_their_pages_back(server, book):
    """Disconnect in the middle of many long streams; afterwards the cache is empty."""
    body = {"model": NAME, "prompt": book[:900], "max_tokens": 900, "ignore_eos": True}
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(head.encode() + data)
            received = b""
            while b"data: " not in received:
                received += connection.recv(1000)
            assert received.startswith(b"HTTP/1.1 200")
    server.wait_until_cache_is_empty()


def test_a_bad_option_ends_the_start_with_one_sentence():
    command = [str(BIN / "vllm"), "serve", MODEL, "--attention-backend", "SEPLLM"]
    command += ["--additional-config", '{"sepllm": {"window_size": 0}}']
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=ROOT, env=environment()
    )
    assert result.returncode != 0
    assert "SepLLM attention: window_size=0: must be at least 1" in result.stdout + result.stderr


def test_the_engine_core_dies(server):
    # The status is vLLM's own: 0 with one API server process, whatever the attention.
    outcomes, _ = kill_while_busy(server, "VLLM::EngineCore")
    assert outcomes == {"error"}


def test_endless_chat(servers):
    """A conversation twice as long as the model's positions: each turn computes its own tokens, and
    as many blocks are held at the end as at the beginning."""
    server = servers("--enforce-eager", script="serve_endless.sh")
    command = [sys.executable, "examples/endless_chat.py", "--base-url", f"{server.url}/v1"]
    command += ["--turns", "8", "--words", "340"]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment()
    )
    assert shown.returncode == 0, shown.stderr
    rows = [line.split()[:5] for line in shown.stdout.splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    total, computed, blocks = ([int(row[i].replace(",", "")) for row in rows] for i in (1, 2, 4))
    assert total[-1] > 4096
    for now, (earlier, later) in zip(computed[1:], pairwise(total), strict=True):
        # The answer before may be cut into other tokens when it comes back as text; then nothing of
        # it is found. Of the block where it began nothing is, and the next block is not full.
        assert now <= later - earlier + 60 + 2 * 32
    for held, now in zip(blocks, computed, strict=True):
        recent = 255 + now
        assert held <= recent // 32 + 2 + 1 + (64 + recent) // 32 + 2
    assert max(blocks) < total[-1] // 32 // 2
    assert sum(held > 0 for held in blocks) >= 4, "answers end before they are looked at"
    log = server.log.read_text()
    assert "texts of up to 1048576 tokens in 324 of the model's 2048 positions" in log
