"""``kept_prefix`` of every request a worker knows, by position, and where token ids come from.

Indexed by position, a row needs no roll-back: whatever is computed again (rejected drafts, a
preempted request) is simply written again. The ids of a step's tokens are the model's own input.
Those before it (a prefix found in the cache) are counted when a request is first seen.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_sepllm.engine.cpu_plan import IntArray
from vllm_sepllm.policy import CountArray, KeptPolicy

TokenArray = npt.NDArray[np.int32]


class KeptRows:
    """Kept tokens below each position, a row per request.

    Attributes:
        policy: which tokens are kept.
        table: ``[max_num_reqs, max_model_len + 1]`` int32; memory is touched as rows grow.
    """

    def __init__(self, policy: KeptPolicy, max_num_reqs: int, max_model_len: int) -> None:
        self.policy = policy
        self.table: CountArray = np.zeros((max_num_reqs, max_model_len + 1), dtype=np.int32)
        self._counted = np.zeros(max_num_reqs, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.table)

    def restart(self, row: int, token_ids: TokenArray) -> None:
        """Give a row to a request of which ``[num_tokens]`` ids are known."""
        self._count_span(row, token_ids, 0)
        self._counted[row] = len(token_ids)

    def num_counted(self, rows: IntArray) -> IntArray:
        """Tokens counted of each row's request so far."""
        return self._counted[rows]

    def count(
        self, rows: IntArray, token_ids: TokenArray, query_start: CountArray, starts: IntArray
    ) -> None:
        """Count the tokens of a step.

        Args:
            rows: ``[num_reqs]`` row of each request; earlier tokens are counted.
            token_ids: ``[num_tokens]`` of all requests, one after the other.
            query_start: ``[num_reqs + 1]`` where each request's tokens begin.
            starts: ``[num_reqs]`` position of each request's first token.
        """
        lengths = query_start[1:] - query_start[:-1]
        assert (starts <= self._counted[rows]).all(), "tokens before the step are not counted"
        single = (lengths == 1).nonzero()[0]
        position = starts[single]
        flags = self.policy.kept_flags_at(token_ids[query_start[single]], position)
        self.table[rows[single], position + 1] = self.table[rows[single], position] + flags
        for i in (lengths > 1).nonzero()[0]:
            span = token_ids[query_start[i] : query_start[i + 1]]
            self._count_span(int(rows[i]), span, int(starts[i]))
        self._counted[rows] = starts + lengths

    def _count_span(self, row: int, token_ids: TokenArray, start: int) -> None:
        kept = self.policy.kept_flags(token_ids, start)
        below, stop = self.table[row], start + len(token_ids)
        np.cumsum(kept, out=below[start + 1 : stop + 1])
        below[start + 1 : stop + 1] += below[start]


class StepTokens(Protocol):
    """The token ids of a step, for the builder of the kept group's metadata."""

    @property
    def rows(self) -> KeptRows:
        """The rows of all requests."""

    def count(self, num_reqs: int, query_start: CountArray, stops: IntArray) -> IntArray:
        """Count the step's tokens.

        Args:
            num_reqs: requests of the step; the arrays may be longer, for padding.
            query_start: ``[num_reqs + 1]`` where each request's tokens begin.
            stops: ``[num_reqs]`` position behind each request's last token.

        Returns:
            ``[num_reqs]`` row of each request; as many as there really are.
        """


class RunnerTokens:
    """Token ids of the V1 runner, which offers no hook: they are read from its own state.

    Args:
        rows: the rows of all requests.
        runner: ``input_batch``, ``input_ids`` and ``requests`` of the V1 runner are read.
    """

    def __init__(self, rows: Any, runner: Any) -> None:
        self.rows = rows
        self._runner = runner
        self._held: dict[str, tuple[int, object]] = {}
        self._free = list(range(len(rows)))

    def count(self, num_reqs: int, query_start: CountArray, stops: IntArray) -> IntArray:
        """See :class:`StepTokens`."""
        input_batch = self._runner.input_batch
        req_ids = input_batch.req_ids[:num_reqs]
        query_start = query_start[: len(req_ids) + 1]
        starts = stops[: len(req_ids)] - (query_start[1:] - query_start[:-1])
        rows = self._assign(req_ids, self._runner.requests)
        for i in (self.rows.num_counted(rows) < starts).nonzero()[0]:
            self.rows.restart(int(rows[i]), input_batch.token_ids_cpu[i, : starts[i]])
        self.rows.count(rows, self._runner.input_ids.np, query_start, starts)
        return rows

    def _assign(self, req_ids: list[str], states: dict[str, Any]) -> IntArray:
        """Row of each request; a new request under an old id gets a fresh one."""
        rows = np.empty(len(req_ids), dtype=np.int64)
        for index, req_id in enumerate(req_ids):
            state = states.get(req_id)
            held = self._held.get(req_id)
            if held is None or held[1] is not state:
                row = held[0] if held is not None else self._take(req_ids, states)
                self.rows.restart(row, np.zeros(0, dtype=np.int32))
                held = self._held[req_id] = (row, state)
            rows[index] = held[0]
        return rows

    def _take(self, req_ids: list[str], states: dict[str, Any]) -> int:
        """A free row; rows of requests that have ended are given back first."""
        for keep in (states, set(req_ids)):
            for req_id in [r for r in self._held if r not in keep]:
                self._free.append(self._held.pop(req_id)[0])
            if self._free:
                break
        return self._free.pop()
