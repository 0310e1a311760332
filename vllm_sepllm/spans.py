"""Spans: a token that keeps tokens behind itself too, as far as its segment goes.

A fact is several tokens side by side. "The favourite thing of Clara is the violin." is lost if
"Clara" stays and "violin" does not. So a kept token may keep up to ``m`` tokens behind itself, and
a segment end (a full stop, a newline) stops it::

    m = 3, ends = {"."}            a  B  c  d  e  f  B  c  .  d  e       B keeps 3 behind itself
    left before each token         0  0  3  2  1  0  0  3  2  0  0
    kept                              x  x  x  x     x  x  x

The end itself is still kept. A token that is an end keeps nothing behind itself.

All that has to be known of the tokens before one is how many are *left* to its span, a number of at
most ``LONGEST_SPAN``. It follows from the last ids alone, so what is kept stays a function of the
prefix: the same on every rank, for every way of cutting a prompt into chunks, and for every request
that shares the prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
SpanArray = npt.NDArray[np.uint8]

LONGEST_SPAN = 32  # tokens; six bits of a code, and half a sentence


@dataclass(frozen=True, eq=False)
class Spans:
    """Which tokens keep how many behind themselves.

    Attributes:
        after: ``[vocab_size]`` uint8, tokens that a token keeps behind itself; 0 if it keeps none.
        is_end: ``[vocab_size]`` bool, whether a token ends its segment.
    """

    after: SpanArray
    is_end: BoolArray

    @cached_property
    def _after(self) -> SpanArray:
        """``after``, 0 for ends, with a 0 on either side for ids outside the vocabulary."""
        return np.pad(np.where(self.is_end, 0, self.after).astype(np.uint8), 1)

    @cached_property
    def _is_end(self) -> BoolArray:
        return np.pad(self.is_end, 1)

    def left_behind(self, token_id: int, left: int) -> int:
        """Tokens left to a span behind one token, ``left`` being those before it."""
        if not 0 <= token_id < self.after.size:
            return max(left - 1, 0)
        return 0 if self.is_end[token_id] else max(int(self.after[token_id]), left - 1, 0)

    def left_behind_each(self, token_ids: npt.ArrayLike, left: npt.ArrayLike) -> SpanArray:
        """The same for tokens of different requests.

        Args:
            token_ids: ``[num_tokens]``.
            left: ``[num_tokens]``, before each of them.

        Returns:
            ``[num_tokens]`` uint8.
        """
        index = np.asarray(token_ids, dtype=np.int64) + 1
        before = np.asarray(left, dtype=np.uint8)
        kept = np.maximum(self._after.take(index, mode="clip"), before - (before > 0))
        return np.where(self._is_end.take(index, mode="clip"), np.uint8(0), kept)

    def left_along(self, token_ids: npt.ArrayLike, left: int = 0) -> SpanArray:
        """Tokens left to a span before each of consecutive tokens, and behind the last.

        Args:
            token_ids: ``[num_tokens]``.
            left: before the first of them.

        Returns:
            ``[num_tokens + 1]`` uint8.
        """
        index = np.asarray(token_ids, dtype=np.int64) + 1
        after = self._after.take(index, mode="clip").astype(np.int64)
        place = np.arange(index.size + 1)
        segment = np.zeros(index.size + 1, dtype=np.int64)
        np.cumsum(self._is_end.take(index, mode="clip"), out=segment[1:])
        # Place behind the last token that each one keeps; what is left over counts as the place -1.
        reach = np.concatenate([[left], place[1:] + after])
        # The largest of the segment so far: those of earlier segments are smaller than any of it.
        base = segment * (index.size + LONGEST_SPAN + 2)
        reach[1:] += base[:-1]
        furthest = np.maximum.accumulate(reach) - base
        return np.maximum(furthest - place, 0).astype(np.uint8)


def make_spans(
    keep_after: Sequence[tuple[int, Iterable[int]]], segment_ends: Iterable[int], vocab_size: int
) -> Spans | None:
    """The spans of resolved options; ``None`` if nothing keeps anything behind itself.

    Args:
        keep_after: tokens kept behind ids, and these ids; of one given twice, the larger counts.
        segment_ends: ids.
        vocab_size: of the model.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    after = np.zeros(vocab_size, dtype=np.uint8)
    for num_tokens, token_ids in keep_after:
        ids = checked_ids(token_ids, vocab_size, "keep_after")
        after[ids] = np.maximum(after[ids], num_tokens)
    is_end = np.zeros(vocab_size, dtype=np.bool_)
    is_end[checked_ids(segment_ends, vocab_size, "segment_ends")] = True
    return Spans(after, is_end) if after.any() else None


def checked_ids(token_ids: Iterable[int], vocab_size: int, options: str) -> npt.NDArray[np.int64]:
    """Ids as an array.

    Args:
        token_ids: to be checked.
        vocab_size: of the model.
        options: that they come from, for people.

    Raises:
        ValueError: an id lies outside the vocabulary.
    """
    ids = list(token_ids)
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"token id {token_id}: must be below the vocabulary size {vocab_size}; correct "
                f"{options}"
            )
    return np.asarray(ids, dtype=np.int64)
