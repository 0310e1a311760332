"""A `vllm serve` process, started as a user does, and what the tests ask of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
from helpers import MODEL, ROOT

from vllm_sepllm.oracle.dense_mask import first_difference

NAME = "pg19-5m-sep"
# What `examples/serve.sh` needs for the demo model, whose tokenizer has no chat template.
DEMO_MODEL = (
    *("--served-model-name", NAME),
    *("--additional-config", '{"sepllm": {"window_size": 64}}'),
    *("--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", "268435456"),
    *("--chat-template", "examples/chat_template.jinja"),
)
START_SECONDS = 400
BIN = Path(sys.executable).parent

# float32, so that tokens can be compared, a pool that 2,000 separators outgrow, and a log that
# shows which requests have reached the engine. Not compiled, as the start then takes longer than
# what is asked: the stages of `test_parallel.py` are, and `test_compiled`.
SMALL_POOL = (
    *DEMO_MODEL,
    "--enforce-eager",
    "--enable-log-requests",
    *("--dtype", "float32"),
    *("--max-num-batched-tokens", "256"),
    *("--num-gpu-blocks-override", "66"),
)


def environment() -> dict[str, str]:
    """As a user's shell, but for threads: vLLM would bind them to cores that other tests run on."""
    given = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    del given["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return given


class Server:
    """`examples/serve.sh`, or another command, with more options; ready when the constructor
    returns."""

    def __init__(
        self,
        *options: str,
        log: Path,
        env: dict[str, str] | None = None,
        command: str = "examples/serve.sh",
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        line = f"exec {command} --port {self.port} {shlex.join(options)}"
        self.log = log
        path = f"{BIN}:{os.environ['PATH']}"
        given = {"PATH": path, "MODEL": MODEL, "VLLM_LOGGING_LEVEL": "INFO", **(env or {})}
        env = {**environment(), **given}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", line],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=env,
                start_new_session=True,
            )
        self._wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _wait(self) -> None:
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

    def send(self, path: str, data: bytes) -> tuple[int, str]:
        """Status and body of a POST, whatever the status."""
        request = urllib.request.Request(
            f"{self.url}/v1/{path}", data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, path: str, **body: Any) -> tuple[int, str]:
        """The same with a greedy request; ``None`` in ``body`` is JSON's null."""
        return self.send(path, json.dumps({"model": NAME, "temperature": 0, **body}).encode())

    def post(self, path: str, **body: Any) -> Any:
        """The parsed answer to a request that must be answered well."""
        status, text = self.ask(path, **body)
        assert status == 200, text
        return json.loads(text)

    def complete(self, ids: list[int], max_tokens: int = 24, **body: Any) -> list[int]:
        """Token ids of a greedy completion."""
        answer = self.post(
            "completions",
            prompt=ids,
            max_tokens=max_tokens,
            ignore_eos=True,
            return_token_ids=True,
            **body,
        )
        return answer["choices"][0]["token_ids"]

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """Values of a Prometheus metric that carry ``labels``, by engine."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith(f"{name}{{") and all(part in line for part in wanted):
                engine = line.split('engine="')[1].split('"')[0]
                found[engine] = found.get(engine, 0) + float(line.split()[-1])
        assert found, f"no metric {name} with {labels}"
        return found

    def wait_until_cache_is_empty(self) -> None:
        """Every page is back; the engine publishes its usage only now and then.

        Raises:
            AssertionError: not within a minute.
        """
        deadline = time.monotonic() + 60
        while any(usage := self.metric("vllm:kv_cache_usage_perc").values()):
            assert time.monotonic() < deadline, f"KV cache usage is still {list(usage)}"
            time.sleep(0.5)

    def processes(self, name: str) -> list[psutil.Process]:
        """Running processes of this server that vLLM calls ``name``."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in children if name in "".join(process.cmdline()[:1])]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(30)


def check_concurrent(
    server: Server, book: list[int], reference_model: Any, separator_ids: tuple[int, ...]
) -> None:
    """Six requests of all lengths at once get the reference's tokens."""
    prompts = [book[i * 97 : i * 97 + 30 + 110 * i] for i in range(0, 12, 2)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(server.complete, prompts))
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == 24
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None


def _outcome(request: Any, stream: bool) -> str:
    """How an open request ended: "error", "closed" without an answer, or its finish reason."""
    try:
        status, text = request.result()
    except (ConnectionError, HTTPException):
        return "closed"
    if stream:
        assert status == 200
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        if lines[-1:] != ["[DONE]"] or len(lines) == 1:
            return "closed"
        text = lines[-2]
    last = json.loads(text)
    if "error" not in last:
        return last["choices"][0]["finish_reason"]
    assert last["error"]["message"]
    assert last["error"]["code"] == 500
    assert stream or status == 500
    return "error"


def kill_while_busy(server: Server, name: str) -> tuple[set[str], int]:
    """Kill the process vLLM calls ``name`` while requests are open.

    Returns:
        How these ended, and the exit status of the server.
    """
    [victim] = server.processes(name)
    computing = server.processes("VLLM::EngineCore") + server.processes("VLLM::Worker")
    said_before = len(server.log.read_text())
    others = psutil.Process(server.process.pid).children(recursive=True)
    body = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True}
    # They stand still meanwhile: on a loaded machine a request can end before the last is taken.
    for process in computing:
        process.suspend()
    with ThreadPoolExecutor(8) as threads:
        asked = [
            (threads.submit(server.ask, "completions", stream=stream, **body), stream)
            for stream in 4 * (False, True)
        ]
        while server.log.read_text()[said_before:].count("Added request") < len(asked):
            assert not any(request.done() for request, _ in asked)
            time.sleep(0.01)
        victim.kill()
        for process in computing:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        outcomes = {_outcome(request, stream) for request, stream in asked}
    status = server.process.wait(120)
    assert status >= 0, "ended by a signal"
    assert " ERROR " in server.log.read_text()[said_before:]
    deadline = time.monotonic() + 60
    while left := [process for process in others if _lives(process)]:
        assert time.monotonic() < deadline, f"{left} outlived the server"
        time.sleep(0.1)
    return outcomes, status


def _lives(process: psutil.Process) -> bool:
    """Whether it has not ended. Who collects orphans that have is up to the machine, and it may be
    nobody."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
