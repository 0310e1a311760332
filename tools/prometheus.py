"""A Prometheus that asks one server of metrics, and what the dashboard asks of it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "examples/grafana/dashboards/sepllm.json"
START_SECONDS = 60


class Prometheus:
    """Runs until :meth:`stop`.

    Args:
        binary: of Prometheus.
        folder: for its configuration and its data.
        port: of the server that is asked once a second.
    """

    def __init__(self, binary: str, folder: Path, port: int) -> None:
        given = (ROOT / "examples/grafana/prometheus.yml").read_text(encoding="utf8")
        assert "5s" in given
        assert "127.0.0.1:8000" in given
        config = given.replace("5s", "1s").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        (folder / "prometheus.yml").write_text(config, encoding="utf8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [binary, "--config.file", str(folder / "prometheus.yml")]
        command += ["--web.listen-address", f"127.0.0.1:{self.port}"]
        command += ["--storage.tsdb.path", str(folder / "data")]
        self._log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait(folder)
        except BaseException:
            self.stop()
            raise

    def _wait(self, folder: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError, ValueError):
                up = self.ask("query", query="up")["result"]  # it looks for targets every 5 s
                if up and up[0]["value"][1] == "1":
                    return
            time.sleep(0.2)
        raise RuntimeError(f"no Prometheus:\n{(folder / 'log.txt').read_text()[-3000:]}")

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer.

        Raises:
            ValueError: Prometheus does not understand the question.
        """
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{query}: {error.read().decode()}") from error

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
        self._log.close()


def panels() -> list[dict[str, Any]]:
    """Panels of the dashboard that show something."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def filled(query: str, interval: str) -> str:
    """A query as Grafana sends it where all models and engines are chosen."""
    for name, value in (("$model", ".*"), ("$engine", ".*"), ("$__rate_interval", interval)):
        query = query.replace(name, value)
    assert "$" not in query
    return query
