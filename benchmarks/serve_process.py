"""A server that a benchmark starts, watches and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 600
SAMPLE_SECONDS = 0.5
METRIC = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')
EVERYWHERE = {"engine", "model_name"}  # labels that every metric has


class ServerError(RuntimeError):
    """A server did not start, or did not do what it was asked."""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_metrics(text: str) -> dict[str, float]:
    """Values by name, summed over engines; other labels stay in the name."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = METRIC.match(line)
        if match is None or match[1].endswith(("_created", "_bucket")):
            continue
        labels = [pair for pair in LABEL.findall(match[2] or "") if pair[0] not in EVERYWHERE]
        inside = ",".join(f"{key}={value}" for key, value in sorted(labels))
        name = f"{match[1]}{{{inside}}}" if inside else match[1]
        found[name] = found.get(name, 0.0) + float(match[3])
    return found


def total(metrics: dict[str, float], name: str) -> float:
    """Sum of a metric over all its labels."""
    return sum(value for key, value in metrics.items() if key.partition("{")[0] == name)


def is_counter(name: str) -> bool:
    """Whether a metric, labels and all, only ever grows; a histogram is two of them."""
    return name.partition("{")[0].endswith(("_total", "_count", "_sum"))


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals that would end this script wait, so that nothing is half done."""
    held: list[int] = []
    ends = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, lambda got, _: held.append(got)) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in held[:1]:
        signal.raise_signal(number)


class Server:
    """`vllm serve` with options, ready inside the ``with`` and ended behind it, however it ends."""

    def __init__(self, model: str, options: list[str], log: Path) -> None:
        self.log = log
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [str(Path(sys.executable).parent / "vllm"), "serve", model, *options]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        # Only dev mode lets a client empty the prefix cache.
        env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would replace --kv-cache-memory-bytes
        env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        env["VLLM_LOGGING_LEVEL"] = "INFO"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with signals_held(), self.log.open("w") as out:
                # A session of its own: Ctrl-C reaches this script alone, which ends the server.
                self._process = subprocess.Popen(
                    self._command, stdout=out, stderr=out, env=env, start_new_session=True
                )
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.is_running() and time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.5)
        what = (
            f"was not ready after {START_SECONDS} s" if self.is_running() else "ended at its start"
        )
        end = self.log.read_text(errors="replace").strip().splitlines()[-12:]
        raise ServerError(f"The server {what}. The end of its log, {self.log}:\n" + "\n".join(end))

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the process, and whatever it started."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return read_metrics(answer.read().decode())

    def empty_cache(self) -> None:
        """Forget all cached prefixes, once no request holds any.

        Raises:
            ServerError: not within a minute.
        """
        deadline = time.monotonic() + 60
        request = urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST")
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
                if json.load(answer)["success"]:
                    return
            time.sleep(0.5)
        raise ServerError(f"The server's prefix cache was not emptied within a minute: {self.log}")


class Watch:
    """Counters of a server, and how busy it was, from the ``with`` to its end."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._running: list[float] = []
        self._waiting: list[float] = []
        self._usage: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._before = self._server.metrics()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                metrics = self._server.metrics()
            except OSError:  # a server that died is noticed by who sends requests
                continue
            self._running.append(total(metrics, "vllm:num_requests_running"))
            self._waiting.append(total(metrics, "vllm:num_requests_waiting"))
            self._usage.append(total(metrics, "vllm:kv_cache_usage_perc"))

    def result(self) -> dict[str, Any]:
        """What happened; requests that run are a sample every half second."""
        after = self._server.metrics()
        grown = {name: value - self._before.get(name, 0.0) for name, value in after.items()}
        queries = total(grown, "vllm:prefix_cache_queries_total")
        hits = total(grown, "vllm:prefix_cache_hits_total")
        busy = [running for running in self._running if running]
        return {
            "preemptions": total(grown, "vllm:num_preemptions_total"),
            "prefix_hit_rate": hits / queries if queries else 0.0,
            "prefix_hit_tokens": hits,
            "generated_tokens": total(grown, "vllm:generation_tokens_total"),
            "running_max": max(self._running, default=0.0),
            "running_mean": sum(busy) / len(busy) if busy else 0.0,
            "waiting_max": max(self._waiting, default=0.0),
            "kv_usage_max": max(self._usage, default=0.0),
            "sepllm": {
                name.removeprefix("vllm:sepllm_"): value
                for name, value in grown.items()
                if name.startswith("vllm:sepllm_") and is_counter(name)
            },
        }
