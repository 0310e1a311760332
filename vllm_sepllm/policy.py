"""What SepLLM attends to. Integers and arrays in, counts and half-open ranges out.

With ``a`` sinks, a window of ``n`` tokens (the query's own included) and separators ``S``
(SepLLM, arXiv 2412.12094, equation 1, with the causal limit written out)::

    visible(q, k)  =  k <= q  and  ( k < a  or  id[k] in S  or  k > q - n )

A *kept* token is a sink or a separator; it stays visible for ever. (Other policies keep other
tokens instead of separators, see ``POLICIES``, and some tokens keep those behind them too, see
:mod:`vllm_sepllm.spans`; all else is the same.) ``kept_prefix[x]`` counts the kept tokens at
positions below ``x``, and everything else derives from it::

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
positions of the text. So a kept key is rotated back once, from its position to its entry, and the
query that meets it by as many positions as are missing between them in the cache: the evicted
ones, and with a bound those of separators no longer seen (:meth:`KeepRule.stream_shift`).

Being kept depends on a token's position, its id and the ids of the few tokens before it. So it is
the same on every rank, for every way of cutting a prompt into chunks, and for every request that
shares the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_sepllm.spans import BoolArray, SpanArray, Spans, checked_ids, make_spans

if TYPE_CHECKING:
    from vllm_sepllm.config import SepLLMConfig

CountArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SeenStream:
    """Which entries of the stream a query sees, of those before its window.

    Attributes:
        num_sink_tokens: ``a``, tokens.
        max_separator_tokens: ``s``, entries seen beside the sinks; ``None`` is all.
    """

    num_sink_tokens: int
    max_separator_tokens: int | None = None

    def first_entry(self, limit: int) -> int:
        """First entry beside the sinks that a query of this limit sees; 0 without a bound, sinks
        then being part of what is read."""
        if self.max_separator_tokens is None:
            return 0
        return max(min(limit, self.num_sink_tokens), limit - self.max_separator_tokens)

    def first_entries(self, limits: npt.ArrayLike) -> CountArray:
        """:meth:`first_entry` of many limits, int32."""
        stops = np.asarray(limits, dtype=np.int32)
        if self.max_separator_tokens is None:
            return np.zeros_like(stops)
        newest = stops - np.int32(self.max_separator_tokens)
        starts: CountArray = np.maximum(np.minimum(stops, np.int32(self.num_sink_tokens)), newest)
        return starts

    def parts(self, limit: int) -> tuple[int, int]:
        """``sinks, first``: a query sees entries ``[0, sinks)`` and ``[first, limit)``.

        Where the two meet it is one part, and ``sinks`` is 0.
        """
        first = self.first_entry(limit)
        sinks = min(self.num_sink_tokens, limit)
        return (sinks, first) if first > sinks else (0, 0)

    def num_sink_pages(self, page_size: int) -> int:
        """Pages that hold sinks: they stay whatever leaves."""
        return -(-self.num_sink_tokens // page_size)

    def unseen_pages(self, limit: int, page_size: int) -> tuple[int, int]:
        """``first, stop``: pages ``[first, stop)`` hold nothing that a query of this limit sees,
        nor any later one. Empty without a bound."""
        first = self.num_sink_pages(page_size)
        return first, max(first, self.first_entry(limit) // page_size)


@dataclass(frozen=True, eq=False)
class KeepRule:
    """Which tokens are kept, and what a query sees. Plain data: all the engine knows of a policy.

    Attributes:
        num_sink_tokens: ``a``, tokens.
        window_size: ``n``, tokens, the query's own included.
        is_kept: ``[vocab_size]`` bool, indexed by token id: kept wherever they stand.
        interval: tokens at multiples of it are kept, whatever they are; 0 is none.
        max_separator_tokens: ``s``, kept tokens seen before the window beside the sinks; ``None``
            is all.
        spans: which tokens keep those behind them too; ``None`` if none does.
    """

    num_sink_tokens: int
    window_size: int
    is_kept: BoolArray
    interval: int = 0
    max_separator_tokens: int | None = None
    spans: Spans | None = None

    @staticmethod
    def of(config: SepLLMConfig, vocab_size: int) -> KeepRule:
        """The rule of resolved options.

        Raises:
            ValueError: separator ids are missing or outside the vocabulary.
        """
        is_kept, interval = POLICIES[config.policy].keeps(config, vocab_size)
        sizes = config.num_sink_tokens, config.window_size
        spans = make_spans(*config.resolved_spans, vocab_size)
        return KeepRule(*sizes, is_kept, interval, config.max_separator_tokens, spans)

    @cached_property
    def seen(self) -> SeenStream:
        """Which entries of the stream a query sees."""
        return SeenStream(self.num_sink_tokens, self.max_separator_tokens)

    @cached_property
    def _guarded(self) -> BoolArray:
        """``is_kept`` with a false on either side for ids outside the vocabulary."""
        return np.pad(self.is_kept, 1)

    def keeps(self, token_id: int, position: int, span_left: int = 0) -> bool:
        """Whether one token is kept, without arrays; ``span_left`` is of the tokens before it."""
        return (
            span_left > 0
            or position < self.num_sink_tokens
            or (0 <= token_id < self.is_kept.size and bool(self.is_kept[token_id]))
            or (self.interval > 0 and position % self.interval == 0)
        )

    def kept_flags(self, token_ids: npt.ArrayLike, first_position: int = 0) -> BoolArray:
        """Flag the kept ones among consecutive tokens, before which no span began.

        Args:
            token_ids: ``[num_tokens]`` ids; some may lie outside the vocabulary.
            first_position: position of ``token_ids[0]`` in its request.

        Returns:
            ``[num_tokens]`` bool.
        """
        return self.kept_flags_along(token_ids, first_position)[0]

    def kept_flags_along(
        self, token_ids: npt.ArrayLike, first_position: int, span_left: int = 0
    ) -> tuple[BoolArray, SpanArray | None]:
        """The same, behind tokens of which a span may have some left to keep.

        Args:
            token_ids, first_position: see :meth:`kept_flags`.
            span_left: before the first token, see :mod:`vllm_sepllm.spans`.

        Returns:
            The flags, and ``[num_tokens]`` uint8, what is left behind each token; ``None`` without
            spans.
        """
        ids = np.asarray(token_ids)
        positions = np.arange(first_position, first_position + ids.size)
        flags = self._flags_of_one(ids, positions)
        if self.spans is None:
            return flags, None
        left = self.spans.left_along(ids, span_left)
        flags |= left[:-1] > 0
        return flags, left[1:]

    def kept_flags_at(
        self, token_ids: npt.ArrayLike, positions: npt.ArrayLike, span_left: npt.ArrayLike = 0
    ) -> tuple[BoolArray, SpanArray | None]:
        """The same for single tokens of different requests, at ``positions``; all arguments
        ``[num_tokens]``."""
        flags = self._flags_of_one(token_ids, positions)
        if self.spans is None:
            return flags, None
        flags |= np.asarray(span_left) > 0
        return flags, self.spans.left_behind_each(token_ids, span_left)

    def _flags_of_one(self, token_ids: npt.ArrayLike, positions: npt.ArrayLike) -> BoolArray:
        """Those kept whatever stands before them."""
        ids = np.asarray(token_ids, dtype=np.int64)
        at = np.asarray(positions, dtype=np.int64)
        flags: BoolArray = self._guarded.take(ids + 1, mode="clip") | (at < self.num_sink_tokens)
        if self.interval:
            flags |= at % self.interval == 0
        return flags

    @cached_property
    def token_codes(self) -> SpanArray:
        """``[vocab_size]`` uint8, all there is to know of a token's id: whether it is kept (1), how
        many it keeps behind itself (times 2) and whether it ends its segment (128)."""
        codes = self.is_kept.astype(np.uint8)
        if self.spans is not None:
            codes |= (self.spans.after << 1) | (self.spans.is_end.astype(np.uint8) << 7)
        return codes

    def window_start(self, position: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """First position of the window of queries at ``position``; the last is its own."""
        return np.maximum(0, np.asarray(position, dtype=np.int64) - self.window_size + 1)

    def stream_limit(self, kept_prefix: CountArray, position: npt.ArrayLike) -> CountArray:
        """Stream entries ``[0, limit)`` that queries at ``position`` attend to."""
        return kept_prefix[self.window_start(position)]

    def stream_shift(self, limit: npt.ArrayLike, position: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Positions that a query is rotated back by to meet stream keys at their entries.

        Entry ``j`` is ``limit - j`` before the window in the cache, whatever its bound. The sinks
        are nearer if there is one: :meth:`sink_shift`.

        Args:
            limit: of the queries, see :meth:`stream_limit`.
            position: of the queries in the text.
        """
        return self.window_start(position) - np.asarray(limit, dtype=np.int64)

    def sink_shift(self, limit: npt.ArrayLike, position: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The same to meet the keys of the sinks, which with a bound are followed by the newest
        separators alone."""
        limits = np.asarray(limit, dtype=np.int64)
        sinks = np.minimum(limits, self.num_sink_tokens)
        skipped = np.maximum(0, self.seen.first_entries(limits) - sinks)
        return self.stream_shift(limits - skipped, position)


@dataclass(frozen=True)
class Policy:
    """A way of choosing the tokens that stay beside sinks and window.

    It looks at nothing but a token's id and position, so that every rank and every way of cutting a
    prompt agrees. (What its tokens keep behind themselves comes on top: ``keep_after``.)

    Attributes:
        keeps: from options and the size of the vocabulary, ``is_kept`` and ``interval`` of its
            :class:`KeepRule`.
        title: what people call it.
        chosen: what they call a token that it keeps; "" if it keeps none.
        many: and several of them.
        meaning: which these are, from the options.
        uses_keep: it keeps the tokens of the option ``keep``.
        uses_interval: it needs the option ``interval``.
        share: from the options, kept tokens per token; ``None`` where it depends on the text.
    """

    keeps: Callable[[SepLLMConfig, int], tuple[BoolArray, int]]
    title: str
    chosen: str = ""
    many: str = ""
    meaning: Callable[[SepLLMConfig], str] = lambda config: ""
    uses_keep: bool = False
    uses_interval: bool = False
    share: Callable[[SepLLMConfig], float] | None = None


def table_of(token_ids: Iterable[int], vocab_size: int) -> BoolArray:
    """``[vocab_size]`` bool that is true at ``token_ids``.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    table = np.zeros(vocab_size, dtype=np.bool_)
    table[checked_ids(token_ids, vocab_size, "keep or separator_token_ids")] = True
    return table


def _listed(config: SepLLMConfig, vocab_size: int) -> tuple[BoolArray, int]:
    if config.kept_ids is None:
        raise ValueError("keep is not resolved: call resolve_kept first")
    return table_of(config.kept_ids, vocab_size), 0


def _separators_seen(config: SepLLMConfig) -> str:
    bound = config.max_separator_tokens
    return "separator" if bound is None else f"one of the {bound:,} newest separators"


# By the name that users choose them by. To add one is to add it here, to the oracle
# (``oracle/dense_mask.py``) and to the tests: see CONTRIBUTING.
POLICIES = {
    # arXiv 2412.12094
    "sepllm": Policy(
        _listed,
        title="SepLLM",
        chosen="separator",
        many="separators",
        meaning=_separators_seen,
        uses_keep=True,
    ),
    # StreamingLLM, arXiv 2309.17453: nothing beside sinks and window
    "streaming": Policy(
        lambda config, vocab_size: (table_of((), vocab_size), 0),
        title="StreamingLLM",
        share=lambda config: 0.0,
    ),
    # FixLLM, the ablation of arXiv 2412.12094: every so many tokens one
    "fixed_interval": Policy(
        lambda config, vocab_size: (table_of((), vocab_size), config.interval or 0),
        title="FixLLM",
        chosen="interval",
        many="kept by the interval",
        meaning=lambda config: f"position is a multiple of {config.interval},",
        uses_interval=True,
        share=lambda config: 1 / (config.interval or 1),
    ),
}
