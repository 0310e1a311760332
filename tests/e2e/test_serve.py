"""`vllm serve MODEL --attention-backend sepllm`, over HTTP, as a user starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import MODEL, ROOT

from vllm_sepllm.engine.compat import vllm_version
from vllm_sepllm.reference import first_difference

pytestmark = pytest.mark.e2e

NAME = "pg19-5m-sep"
START_SECONDS = 240
BIN = Path(sys.executable).parent


def environment():
    """As a user's shell: without what the tests set for engines in this process."""
    unset = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")
    return {key: value for key, value in os.environ.items() if key not in unset}


class Server:
    def __init__(self, *options, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [str(ROOT / "examples/serve.sh"), "--port", str(self.port), *options]
        self.log = log
        env = {**environment(), "PATH": f"{BIN}:{os.environ['PATH']}", "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self._wait()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def _wait(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"no server after {START_SECONDS} s:\n{self.log.read_text()[-5000:]}")

    def post(self, path, **body):
        request = urllib.request.Request(
            f"{self.url}/v1/{path}",
            data=json.dumps({"model": NAME, "temperature": 0, **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.loads(response.read())

    def complete(self, ids, max_tokens=24):
        answer = self.post(
            "completions",
            prompt=ids,
            max_tokens=max_tokens,
            ignore_eos=True,
            return_token_ids=True,
        )
        return answer["choices"][0]["token_ids"]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """float32, so that tokens can be compared; a pool too small for 2,000 separators."""
    options = ("--dtype", "float32", "--max-num-batched-tokens", "256")
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    server = Server(*options, "--num-gpu-blocks-override", "70", log=log)
    yield server
    server.stop()


def test_one_line_says_what_is_active(server):
    lines = [line for line in server.log.read_text().splitlines() if "SepLLM attention:" in line]
    assert len(lines) == 1
    for part in ("INFO", "policy=sepllm", "4 sinks", "window of 64 tokens", "9 separator ids"):
        assert part in lines[0]
    for part in ("block size 32", f"vLLM {vllm_version()}"):
        assert part in lines[0]


def test_concurrent_requests_equal_the_reference(server, book, reference_model, separator_ids):
    prompts = [book[i * 97 : i * 97 + 30 + 110 * i] for i in range(12)]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(server.complete, prompts))
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == 24
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None


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


def test_a_request_that_can_never_fit_is_answered(server, book, reference_model, separator_ids):
    """An error, not a hang; the server lives on and the next answer is right."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.complete([separator_ids[0]] * 2000, max_tokens=8)
    assert caught.value.code >= 400
    assert "need" in server.log.read_text()
    assert "KV cache blocks under SepLLM attention" in server.log.read_text()
    tokens = server.complete(book[:200])
    assert first_difference(reference_model, book[:200], tokens, separator_ids, 4, 64) is None


def test_clients_that_leave_give_their_pages_back(server, book):
    """Disconnect in the middle of many long streams; afterwards the cache is empty."""
    body = {"model": NAME, "prompt": book[:900], "max_tokens": 900, "ignore_eos": True}
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(head.encode() + data)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 60
    usage = ""
    while time.monotonic() < deadline:
        metrics = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
        lines = [line for line in metrics.splitlines() if line.startswith("vllm:kv_cache_usage")]
        usage = lines[0].split()[-1]
        if float(usage) == 0:
            return
        time.sleep(0.5)
    pytest.fail(f"KV cache usage is still {usage}")


def test_a_bad_option_ends_the_start_with_one_sentence():
    command = [str(BIN / "vllm"), "serve", MODEL, "--attention-backend", "SEPLLM"]
    command += ["--additional-config", '{"sepllm": {"window_size": 0}}']
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=ROOT, env=environment()
    )
    assert result.returncode != 0
    assert "SepLLM attention: window_size=0: must be at least 1" in result.stdout + result.stderr
