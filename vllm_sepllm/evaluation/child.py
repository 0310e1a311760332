"""Processes of their own, whose log is a file, and why one ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REASON = "reason: "  # before the last line of a log


class EvaluationError(RuntimeError):
    """Something could not be evaluated; one sentence says why."""


class Child:
    """A process that runs a module of this package.

    Attributes:
        process: with pipes for standard input and output.
        log: file with all that it said otherwise.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log

    def answers(self, prefix: str) -> Iterator[str]:
        """What it prints behind a prefix, line by line, until it ends. The rest goes to the log."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(prefix):
                yield line.removeprefix(prefix).rstrip("\n")
            else:
                with self.log.open("a", encoding="utf8") as log:
                    log.write(line)

    def say(self, line: str) -> None:
        """Give it a line, which a process that has ended does not get."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def failure(self) -> str | None:
        """Why it ended, and where its log is; ``None`` if all went well. Waits for its end."""
        assert self.process.stdout is not None
        with self.log.open("a", encoding="utf8") as log:
            log.write(self.process.stdout.read())
        code = self.process.wait()
        return None if code == 0 else f"{reason_in(self.log, code)}; all it said is in {self.log}"

    def end(self) -> None:
        """Kill it, if it runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def child(module: str, job: Path, log: Path) -> Iterator[Child]:
    """Start ``python -P -m MODULE JOB``; it is ended at the latest when the block is left.

    With ``-P`` nothing is imported from the current folder, which may be that of a model.

    Args:
        module: full name.
        job: file that it reads.
        log: file for its standard error.
    """
    command = [sys.executable, "-P", "-m", module, str(job)]
    log.unlink(missing_ok=True)
    with log.open("a", encoding="utf8") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=_environment(),
        )
        found = Child(process, log)
        try:
            yield found
        finally:
            found.end()


def _environment() -> dict[str, str]:
    """Ours. Many container images keep Python from writing compiled code beside its source, and
    each process would compile vLLM again, for ten seconds: it goes to the user's cache then."""
    found = dict(os.environ)
    if found.pop("PYTHONDONTWRITEBYTECODE", None):
        cache = Path(found.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        found.setdefault("PYTHONPYCACHEPREFIX", str(cache / "vllm-sepllm/compiled"))
    return found


def reason_in(log: Path, status: int) -> str:
    """Why a process ended: what it said last, or the signal that ended it."""
    if status < 0:
        return f"it was ended by signal {-status} (9 is often a machine without memory left)"
    lines = log.read_text(encoding="utf8", errors="replace").splitlines()
    reasons = [line.removeprefix(REASON) for line in lines if line.startswith(REASON)]
    said = reasons[-1:] or lines[-1:] or ["it said nothing"]
    return said[0].strip().rstrip(".")[:500]
