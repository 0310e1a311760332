"""Asks a search worker, and remembers what it answered, so that a search goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any

from vllm_sepllm.evaluation.child import Child, EvaluationError, child
from vllm_sepllm.evaluation.report import marks
from vllm_sepllm.evaluation.run import Evaluation
from vllm_sepllm.evaluation.search import Candidate, Rung, Score
from vllm_sepllm.evaluation.search_worker import ANSWER
from vllm_sepllm.evaluation.worker import write_json


class Searcher:
    """Measures candidates on the material of an evaluation.

    Attributes:
        failed: a sentence for each candidate that could not be served.
        num_late: candidates that were left out for lack of time.
    """

    def __init__(self, evaluation: Evaluation, seconds: float) -> None:
        self._evaluation = evaluation
        self._deadline = time.monotonic() + seconds
        self._file = evaluation.folder / "search.jsonl"
        self._started = ExitStack()
        self._worker: Child | None = None
        self._known: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.num_late = 0
        if self._file.exists():
            lines = self._file.read_text(encoding="utf8", errors="replace").splitlines()
            found = [line for line in lines if _is_record(line)]
            if found != lines:  # the last line of a process that was killed
                self._file.write_text("".join(f"{line}\n" for line in found), encoding="utf8")
            self._known = dict(map(json.loads, found))

    def __enter__(self) -> Searcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._started.close()

    @property
    def _is_late(self) -> bool:
        """The time is over."""
        return time.monotonic() > self._deadline

    def score(self, candidate: Candidate, rung: Rung) -> Score | None:
        """Of a candidate; ``None`` if it cannot be served, or the time is over."""
        if candidate.name in self.failed:
            return None
        wanted = self._missing(candidate.options, rung)
        if any(wanted):
            if self._is_late:
                self.num_late += 1
                return None
            self._ask(candidate, *wanted)
            if candidate.name in self.failed:
                return None
        return self._score(candidate.options, rung)

    def report(self, candidate: Candidate, rung: Rung) -> Score | None:
        """The same, whatever the time is."""
        deadline, self._deadline = self._deadline, math.inf
        try:
            return self.score(candidate, rung)
        finally:
            self._deadline = deadline

    def _key(self, options: dict[str, Any] | None, kind: str, number: int) -> str:
        return json.dumps([self._evaluation.mark, options, kind, number], sort_keys=True)

    def _missing(self, options: dict[str, Any] | None, rung: Rung) -> tuple[list[int], list[int]]:
        def missing(kind: str, numbers: Sequence[int]) -> list[int]:
            return [n for n in numbers if self._key(options, kind, n) not in self._known]

        return missing("text", rung.texts), missing("document", rung.documents)

    def _score(self, options: dict[str, Any] | None, rung: Rung) -> Score:
        nats = [x for n in rung.texts for x in self._known[self._key(options, "text", n)]]
        right: list[bool] = []
        for number in rung.documents:
            replies = self._known[self._key(options, "document", number)]
            right += marks(self._evaluation.material.about(number), replies)
        return Score(sum(nats) / max(1, len(nats)), sum(right), len(right))

    def _ask(self, candidate: Candidate, texts: list[int], documents: list[int]) -> None:
        if self._worker is None:
            self._worker = self._started.enter_context(self._start())
        asked = {"options": candidate.options, "texts": texts, "documents": documents}
        self._worker.say(json.dumps(asked))
        said = next(self._worker.answers(ANSWER), None)
        if said is None:
            failure = self._worker.failure() or "it ended before its time"
            raise EvaluationError(f"the search ended: {failure}")
        answer = json.loads(said)
        if "error" in answer:
            self.failed[candidate.name] = answer["error"]
            return
        with self._file.open("a", encoding="utf8") as file:
            for kind, found in (("text", answer["texts"]), ("document", answer["documents"])):
                for number, value in found.items():
                    key = self._key(candidate.options, kind, int(number))
                    self._known[key] = value
                    file.write(json.dumps([key, value]) + "\n")

    def _start(self) -> AbstractContextManager[Child]:
        evaluation = self._evaluation
        material, job = (evaluation.folder / f"search{end}" for end in ("-material.json", ".job"))
        write_json(material, asdict(evaluation.material))
        found = {"model": evaluation.model.name, "engine": evaluation.arguments}
        write_json(job, {**found, "material": str(material.resolve())})
        log = evaluation.folder / "search.log"
        return child("vllm_sepllm.evaluation.search_worker", job, log)


def _is_record(line: str) -> bool:
    try:
        key, _ = json.loads(line)
    except (ValueError, TypeError):
        return False
    return isinstance(key, str)
