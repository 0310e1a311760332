"""One server at a time, shared by consecutive tests of a file that ask for the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Servers by their options; asking for another, or after its end, starts a new one.

    The last ends with its file: ranks of a server with nothing to do still look for work.
    """
    keeper = ServerKeeper(tmp_path_factory.mktemp("serve"))
    yield keeper.get
    keeper.close()


class ServerKeeper:
    """Holds one server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self._asked: Any = None
        self._server: Server | None = None

    def get(self, *options: str, **more: Any) -> Server:
        alive = self._server is not None and self._server.process.poll() is None
        if self._server is None or not alive or self._asked != (options, more):
            self.close()
            self._started += 1
            log = self._folder / f"log{self._started}.txt"
            self._server, self._asked = Server(*options, log=log, **more), (options, more)
        return self._server

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = None
