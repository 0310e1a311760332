"""How many tokens of a request are kept, as it grows and is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_sepllm.policy import CountArray, KeepRule
from vllm_sepllm.spans import SpanArray


class KeptCounts:
    """The growing ``kept_prefix`` of one request.

    Counting is incremental: each token is looked at once, however often counts are asked for.
    """

    __slots__ = ("_left", "_prefix", "_rule", "num_tokens")

    def __init__(self, rule: KeepRule) -> None:
        self._rule = rule
        self._prefix: CountArray = np.zeros(64, dtype=np.int32)
        # What a span has left before each position.
        self._left: SpanArray | None = None if rule.spans is None else np.zeros(64, dtype=np.uint8)
        self.num_tokens = 0  # tokens counted so far; arrays are valid up to it, it included

    def extend(self, token_ids: Sequence[int]) -> None:
        """Count the tokens that follow the ones counted so far."""
        start, stop = self.num_tokens, self.num_tokens + len(token_ids)
        if stop >= self._prefix.size:
            size = max(stop + 1, 2 * self._prefix.size)
            self._prefix = _grown(self._prefix, start + 1, size)
            if self._left is not None:
                self._left = _grown(self._left, start + 1, size)
        if stop == start + 1:  # a decode step; numpy's set-up would cost more than the work
            self._count_one(token_ids[0])
        else:
            left = 0 if self._left is None else int(self._left[start])
            flags, lefts = self._rule.kept_flags_along(token_ids, start, left)
            np.cumsum(flags, dtype=np.int32, out=self._prefix[start + 1 : stop + 1])
            self._prefix[start + 1 : stop + 1] += self._prefix[start]
            if self._left is not None and lefts is not None:
                self._left[start + 1 : stop + 1] = lefts
        self.num_tokens = stop

    def _count_one(self, token_id: int) -> None:
        at, left = self.num_tokens, 0
        if self._left is not None:
            assert self._rule.spans is not None
            left = int(self._left[at])
            self._left[at + 1] = self._rule.spans.left_behind(token_id, left)
        self._prefix[at + 1] = self._prefix[at] + self._rule.keeps(token_id, at, left)

    def truncate(self, num_tokens: int) -> None:
        """Forget every token at or past position ``num_tokens``."""
        self.num_tokens = min(self.num_tokens, num_tokens)

    def kept(self, num_tokens: int) -> int:
        """Kept tokens among the first ``num_tokens``; tokens not counted yet count as kept."""
        known = min(num_tokens, self.num_tokens)
        return int(self._prefix[known]) + num_tokens - known

    def last_kept(self, num_tokens: int) -> int:
        """Position of the last kept one of the first ``num_tokens`` tokens, which are counted; -1
        if none is kept."""
        prefix = self.prefix
        return int(np.searchsorted(prefix, prefix[num_tokens])) - 1

    @property
    def prefix(self) -> CountArray:
        """``[num_tokens + 1]`` int32: kept tokens below each position."""
        return self._prefix[: self.num_tokens + 1]


def _grown(array: Any, num_valid: int, size: int) -> Any:
    """A larger array with the same first ``num_valid`` elements."""
    grown = np.zeros(size, dtype=array.dtype)
    grown[:num_valid] = array[:num_valid]
    return grown
