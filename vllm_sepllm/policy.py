"""What SepLLM attends to. Integers and arrays in, counts and half-open ranges out.

With ``a`` sinks, a window of ``n`` tokens (the query's own included) and separators ``S``
(SepLLM, arXiv 2412.12094, equation 1, with the causal limit written out)::

    visible(q, k)  =  k <= q  and  ( k < a  or  id[k] in S  or  k > q - n )

A *kept* token is a sink or a separator; it stays visible for ever. (Other policies choose other
tokens instead of separators; all else is the same.) ``kept_prefix[x]`` counts
the kept tokens at positions below ``x``, and everything else derives from it::

    position   0  1  2  3  4  5  6  7  8  9        a = 1, n = 3, S = {"."}
    token      A  b  .  c  d  .  e  .  f  g        query at position 9
    kept       x     x        x     x
    stream     0     1        2     3              entry of each kept token: kept_prefix[p]
                                    [window ]      positions [7, 10)
    attended   x     x        x     x  x  x        stream [0, 3), window [7, 10)

The kept token at position 7 is inside the window, so the stream limit stops before it:
both parts are disjoint and together they are exactly the visible set.

With a bound of ``s`` separators a query sees, of those before its window, the sinks and the
newest ``s`` alone: entries ``[0, min(a, L))`` and ``[max(min(a, L), L - s), L)``, ``L`` being its
limit. Limits never decrease, so an entry that one query no longer sees is seen by none after it.

In *cache positions* (StreamingLLM, arXiv 2309.17453, section 3.2) what a query sees is numbered
from 0: sinks and separators by their place in the stream, then the window. Nothing is renumbered
for it. Rotary embeddings see differences only, and inside the window those are what they are in
positions of the text. So a kept key is turned back once, from its position to its entry, and the
query that meets it by as many positions as are missing between them in the cache: the evicted
ones, and with a bound those of separators no longer seen (:meth:`KeptPolicy.stream_lag`).

Being kept depends on a token's id and position alone. So it is the same on every rank, for
every way of cutting a prompt into chunks, and for every request that shares the prefix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_sepllm.config import SepLLMConfig

BoolArray = npt.NDArray[np.bool_]
CountArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class KeptPolicy(ABC):
    """Which tokens are kept, and what a query sees.

    A subclass says which tokens it keeps beside the sinks, and registers itself under the name
    that users choose it by: ``class Mine(KeptPolicy, name="mine")``.

    Attributes:
        num_sink_tokens: ``a``, tokens.
        window_size: ``n``, tokens, the query's own included.
        max_separator_tokens: ``s``, kept tokens seen before the window beside the sinks; ``None``
            is all.
    """

    num_sink_tokens: int
    window_size: int
    max_separator_tokens: int | None = field(default=None, kw_only=True)
    registered: ClassVar[dict[str, type[KeptPolicy]]] = {}

    def __init_subclass__(cls, *, name: str) -> None:
        KeptPolicy.registered[name] = cls

    @staticmethod
    def from_config(config: SepLLMConfig, vocab_size: int) -> KeptPolicy:
        """The policy of resolved options.

        Raises:
            ValueError: separator ids are missing or outside the vocabulary.
        """
        return KeptPolicy.registered[config.policy].build(config, vocab_size)

    @classmethod
    def build(cls, config: SepLLMConfig, vocab_size: int) -> KeptPolicy:
        """One of this class; see :meth:`from_config`."""
        return cls(config.num_sink_tokens, config.window_size)

    @abstractmethod
    def chosen(
        self, token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> BoolArray:
        """Flag the tokens this policy keeps beside the sinks.

        It may look at nothing but a token's id and position, so that every rank and every way
        of cutting a prompt agrees.

        Args:
            token_ids: ``[num_tokens]`` ids; some may lie outside the vocabulary.
            positions: ``[num_tokens]``.

        Returns:
            ``[num_tokens]`` bool.
        """

    def chooses(self, token_id: int, position: int) -> bool:
        """:meth:`chosen` of one token; where it is cheap without arrays, worth overriding."""
        return bool(self.chosen(np.array([token_id]), np.array([position]))[0])

    def kept_flags(self, token_ids: npt.ArrayLike, first_position: int = 0) -> BoolArray:
        """Flag the kept ones among consecutive tokens.

        Args:
            token_ids: ``[num_tokens]`` ids; some may lie outside the vocabulary.
            first_position: position of ``token_ids[0]`` in its request.

        Returns:
            ``[num_tokens]`` bool.
        """
        ids = np.asarray(token_ids)
        return self.kept_flags_at(ids, np.arange(first_position, first_position + ids.size))

    def kept_flags_at(self, token_ids: npt.ArrayLike, positions: npt.ArrayLike) -> BoolArray:
        """The same for tokens at arbitrary ``positions``, also ``[num_tokens]``."""
        at = np.asarray(positions, dtype=np.int64)
        sink: BoolArray = at < self.num_sink_tokens
        return self.chosen(np.asarray(token_ids, dtype=np.int64), at) | sink

    def window_start(self, position: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """First position of the window of queries at ``position``; the last is its own."""
        return np.maximum(0, np.asarray(position, dtype=np.int64) - self.window_size + 1)

    def stream_limit(self, kept_prefix: CountArray, position: npt.ArrayLike) -> CountArray:
        """Stream entries ``[0, limit)`` that queries at ``position`` attend to."""
        return kept_prefix[self.window_start(position)]

    def stream_start(self, limit: npt.ArrayLike) -> CountArray:
        """First entry beside the sinks that queries of these limits attend to.

        Without a bound it is 0, sinks then being part of what is read.
        """
        limits = np.asarray(limit, dtype=np.int32)
        if self.max_separator_tokens is None:
            return np.zeros_like(limits)
        newest = limits - np.int32(self.max_separator_tokens)
        starts: CountArray = np.maximum(np.minimum(limits, np.int32(self.num_sink_tokens)), newest)
        return starts

    def stream_lag(self, limit: npt.ArrayLike, position: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Positions that a query is turned back by to meet stream keys at their entries.

        Entry ``j`` is ``limit - j`` before the window in the cache, whatever its bound. The sinks
        are nearer if there is one: :meth:`sink_lag`.

        Args:
            limit: of the queries, see :meth:`stream_limit`.
            position: of the queries in the text.
        """
        return self.window_start(position) - np.asarray(limit, dtype=np.int64)

    def sink_lag(self, limit: npt.ArrayLike, position: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The same to meet the keys of the sinks, which with a bound are followed by the newest
        separators alone."""
        limits = np.asarray(limit, dtype=np.int64)
        sinks = np.minimum(limits, self.num_sink_tokens)
        return self.stream_lag(limits - np.maximum(0, self.stream_start(limits) - sinks), position)


@dataclass(frozen=True, eq=False)
class SepLLMPolicy(KeptPolicy, name="sepllm"):
    """Separators (SepLLM, arXiv 2412.12094).

    Attributes:
        is_separator: ``[vocab_size]`` bool, indexed by token id.
    """

    is_separator: BoolArray

    @classmethod
    def build(cls, config: SepLLMConfig, vocab_size: int) -> SepLLMPolicy:
        """One of this class; see :meth:`from_config`."""
        ids = config.separator_token_ids
        if ids is None:
            raise ValueError("separator_token_ids is not resolved: call resolve_separators first")
        table = separator_table(ids, vocab_size)
        sizes = config.num_sink_tokens, config.window_size
        return cls(*sizes, table, max_separator_tokens=config.max_separator_tokens)

    def chosen(
        self, token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> BoolArray:
        """Flag separators."""
        flags: BoolArray = self._guarded.take(token_ids + 1, mode="clip")
        return flags

    def chooses(self, token_id: int, position: int) -> bool:
        """Whether it is a separator."""
        return 0 <= token_id < self.is_separator.size and bool(self.is_separator[token_id])

    @cached_property
    def _guarded(self) -> BoolArray:
        """``is_separator`` with a false on either side for ids outside the vocabulary."""
        return np.pad(self.is_separator, 1)


class StreamingPolicy(KeptPolicy, name="streaming"):
    """Nothing beside sinks and window (StreamingLLM, arXiv 2309.17453)."""

    def chosen(
        self, token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> BoolArray:
        """Flag nothing."""
        return np.zeros(len(positions), dtype=np.bool_)

    def chooses(self, token_id: int, position: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True, eq=False)
class FixedIntervalPolicy(KeptPolicy, name="fixed_interval"):
    """Every so many tokens one (FixLLM, the ablation of arXiv 2412.12094).

    Attributes:
        interval: distance between kept tokens; those at multiples of it are kept.
    """

    interval: int

    @classmethod
    def build(cls, config: SepLLMConfig, vocab_size: int) -> FixedIntervalPolicy:
        """One of this class; see :meth:`from_config`."""
        assert config.interval is not None
        return cls(config.num_sink_tokens, config.window_size, config.interval)

    def chosen(
        self, token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> BoolArray:
        """Flag multiples of the interval."""
        flags: BoolArray = positions % self.interval == 0
        return flags

    def chooses(self, token_id: int, position: int) -> bool:
        """Whether the position is a multiple of the interval."""
        return position % self.interval == 0


def separator_table(token_ids: Iterable[int], vocab_size: int) -> BoolArray:
    """``[vocab_size]`` bool that is true at ``token_ids``.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    table = np.zeros(vocab_size, dtype=np.bool_)
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"separator token id {token_id}: must be below the vocabulary size {vocab_size}; "
                "correct separator_token_ids"
            )
        table[token_id] = True
    return table


class KeptCounts:
    """The growing ``kept_prefix`` of one request.

    Counting is incremental: each token is looked at once, however often counts are asked for.
    """

    __slots__ = ("_policy", "_prefix", "num_tokens")

    def __init__(self, policy: KeptPolicy) -> None:
        self._policy = policy
        self._prefix: CountArray = np.zeros(64, dtype=np.int32)
        self.num_tokens = 0  # tokens counted so far; _prefix[: num_tokens + 1] is valid

    def extend(self, token_ids: Sequence[int]) -> None:
        """Count the tokens that follow the ones counted so far."""
        start, stop = self.num_tokens, self.num_tokens + len(token_ids)
        if stop >= self._prefix.size:
            grown = np.zeros(max(stop + 1, 2 * self._prefix.size), dtype=np.int32)
            grown[: start + 1] = self._prefix[: start + 1]
            self._prefix = grown
        if stop == start + 1:  # a decode step; numpy's set-up would cost more than the work
            policy = self._policy
            kept = start < policy.num_sink_tokens or policy.chooses(token_ids[0], start)
            self._prefix[stop] = self._prefix[start] + kept
        else:
            flags = self._policy.kept_flags(token_ids, start)
            np.cumsum(flags, dtype=np.int32, out=self._prefix[start + 1 : stop + 1])
            self._prefix[start + 1 : stop + 1] += self._prefix[start]
        self.num_tokens = stop

    def truncate(self, num_tokens: int) -> None:
        """Forget every token at or past position ``num_tokens``."""
        self.num_tokens = min(self.num_tokens, num_tokens)

    def kept(self, num_tokens: int) -> int:
        """Kept tokens among the first ``num_tokens``; tokens not counted yet count as kept."""
        known = min(num_tokens, self.num_tokens)
        return int(self._prefix[known]) + num_tokens - known

    @property
    def prefix(self) -> CountArray:
        """``[num_tokens + 1]`` int32: kept tokens below each position."""
        return self._prefix[: self.num_tokens + 1]
