"""``kept_prefix`` of every request of a CPU worker, by position, and the kept tokens of a step.

Indexed by position, a row needs no roll-back: whatever is computed again (rejected drafts, a
preempted request) is simply written again. The ids of a step's tokens are the model's own input.
Those before it (a prefix found in the cache) are counted when a request starts or resumes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig

from vllm_sepllm.engine.cpu.tables import IntArray
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.counts import TokenArray
from vllm_sepllm.policy import CountArray, KeepRule


@dataclass(frozen=True)
class KeptTokens:
    """Requests of a step and the kept ones of its tokens, alike for all kept groups.

    Attributes:
        rows: ``[num_reqs]`` int64, row of each request.
        query_start: ``[num_reqs + 1]`` int32, where each request's tokens begin.
        starts: ``[num_reqs]`` position of each request's first token.
        stops: ``[num_reqs]`` position behind each request's last token.
        index: ``[num_kept]`` int64, batch index of each kept token.
        request: ``[num_kept]`` int64, its request.
        position: ``[num_kept]`` int64, its position.
        entry: ``[num_kept]`` int32, its entry in the stream.
    """

    rows: IntArray
    query_start: CountArray
    starts: IntArray
    stops: IntArray
    index: IntArray
    request: IntArray
    position: IntArray
    entry: CountArray


class HostCounts:
    """Kept tokens below each position, a row per request; see ``worker.counts.Counts``.

    Attributes:
        rule: which tokens are kept.
        table: ``[max_num_reqs, max_model_len + 1]`` int32; memory is touched as rows grow.
    """

    def __init__(self, rule: KeepRule, max_num_reqs: int, max_model_len: int) -> None:
        self.rule = rule
        self.table: CountArray = np.zeros((max_num_reqs, max_model_len + 1), dtype=np.int32)
        # What a span has left before each position, like ``table``.
        self._left = None if rule.spans is None else np.zeros(self.table.shape, dtype=np.uint8)
        self._counted = np.zeros(max_num_reqs, dtype=np.int64)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> HostCounts:
        """Counts of a worker."""
        return cls(
            Settings.of(vllm_config).rule,
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )

    def __len__(self) -> int:
        return len(self.table)

    def restart(self, row: int, token_ids: TokenArray) -> None:
        """Give a row to a request whose first ``[num_tokens]`` ids are computed already."""
        if len(token_ids):
            self._count_span(row, token_ids, 0)
        self._counted[row] = len(token_ids)

    def step(self, index: torch.Tensor, token_ids: torch.Tensor) -> HostStep:
        """See ``worker.counts.Counts``."""
        return HostStep(self, index.numpy(), token_ids.numpy())

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
        if single.size:
            row, position, ids = rows[single], starts[single], token_ids[query_start[single]]
            left = 0 if self._left is None else self._left[row, position]
            flags, lefts = self.rule.kept_flags_at(ids, position, left)
            self.table[row, position + 1] = self.table[row, position] + flags
            if self._left is not None and lefts is not None:
                self._left[row, position + 1] = lefts
        for i in (lengths > 1).nonzero()[0]:
            span = token_ids[query_start[i] : query_start[i + 1]]
            self._count_span(int(rows[i]), span, int(starts[i]))
        self._counted[rows] = starts + lengths

    def _count_span(self, row: int, token_ids: TokenArray, start: int) -> None:
        left = 0 if self._left is None else int(self._left[row, start])
        kept, lefts = self.rule.kept_flags_along(token_ids, start, left)
        below, stop = self.table[row], start + len(token_ids)
        np.cumsum(kept, out=below[start + 1 : stop + 1])
        below[start + 1 : stop + 1] += below[start]
        if self._left is not None and lefts is not None:
            self._left[row, start + 1 : stop + 1] = lefts


# What blocks of rows of a prompt see, by the size of pages and the number of the prompt in a plan.
Masks = dict[tuple[int, int], dict[int, torch.Tensor]]


class HostStep:
    """One step, for the builders of all kept groups.

    Attributes:
        counts: of all requests.
        masks: what layers have made, for those of all groups.

    Args:
        counts: of all requests.
        index: ``[num_reqs]`` row of each request.
        token_ids: ``[num_tokens]`` of all requests, one after the other; may be longer.
    """

    def __init__(self, counts: HostCounts, index: IntArray, token_ids: TokenArray) -> None:
        self.counts = counts
        self._index = index
        self._token_ids = token_ids
        self._found: KeptTokens | None = None
        self.masks: Masks = {}

    def kept_tokens(self, query_start: CountArray, stops: IntArray) -> KeptTokens:
        """The step's kept tokens. The first group's question has them counted, once.

        Args:
            query_start: ``[num_reqs + 1]`` where each request's tokens begin.
            stops: ``[num_reqs]`` position behind each request's last token.
        """
        if self._found is None:
            num_reqs = len(self._index)
            self._found = self._find(query_start[: num_reqs + 1], stops[:num_reqs])
        return self._found

    def _find(self, query_start: CountArray, stops: IntArray) -> KeptTokens:
        rows = self._index
        num_reqs, lengths = len(rows), query_start[1:] - query_start[:-1]
        starts = stops - lengths
        self.counts.count(rows, self._token_ids, query_start, starts)
        if query_start[-1] == num_reqs == np.count_nonzero(lengths > 0):  # one token each
            request, row, position = np.arange(num_reqs), rows, starts
        else:
            request = np.repeat(np.arange(num_reqs), lengths)
            offset = starts - query_start[:-1]  # position less batch index
            row, position = rows[request], np.arange(request.size) + offset[request]
        entry = self.counts.table[row, position]
        index = (self.counts.table[row, position + 1] > entry).nonzero()[0]
        where = request[index], position[index], entry[index]
        return KeptTokens(rows, query_start, starts, stops, index, *where)
