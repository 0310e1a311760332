"""What each token of a batch of texts sees: the contract of ``packed_attention``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """What each token of texts that lie one behind the other sees.

    The *stream* is the kept tokens of all texts, in their order. The token at place ``p`` sees the
    places ``[window_first[p], p]``, and of the stream the entries ``[first, limit)`` of
    ``stream[p]`` and of ``sinks[p]``. The three do not overlap, and none of their ends ever
    decreases from one place to the next. So what a tile of tokens sees lies between what its first
    and its last one see, and what sees a tile of entries is one run of tokens.

    Attributes:
        kept: ``[num_kept]`` int64, places of the stream's entries, rising.
        window_first: ``[num_tokens]`` int32, places.
        stream: ``[2, num_tokens]`` int32, firsts and limits, entries.
        sinks: the same of the sinks, where they are not part of ``stream``; ``None`` where they
            are.
    """

    kept: torch.Tensor
    window_first: torch.Tensor
    stream: torch.Tensor
    sinks: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Of all texts."""
        return self.window_first.shape[0]

    @property
    def ranges(self) -> tuple[torch.Tensor, ...]:
        """The ranges of the stream, ``[2, num_tokens]`` each."""
        return (self.stream,) if self.sinks is None else (self.sinks, self.stream)

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        places = torch.arange(1, self.num_tokens + 1, device=self.window_first.device)
        in_window = (places - self.window_first).sum()
        return int(in_window + sum((limit - first).sum() for first, limit in self.ranges))

    @cached_property
    def seen_in_stream(self) -> torch.Tensor:
        """``[2, num_kept]`` int32: first and stop of the run of tokens that see each entry."""
        return _seen_by(self.kept.shape[0], *self.stream)

    @cached_property
    def seen_as_sink(self) -> torch.Tensor:
        """The same of ``sinks``, which must be there."""
        assert self.sinks is not None
        return _seen_by(self.kept.shape[0], *self.sinks)

    @cached_property
    def seen_in_window(self) -> torch.Tensor:
        """``[2, num_tokens]`` int32: first and stop of those whose window holds each token."""
        place = torch.arange(1, self.num_tokens + 1, device=self.window_first.device)
        return _seen_by(self.num_tokens, self.window_first, place.to(self.window_first.dtype))

    @cached_property
    def stream_entry(self) -> torch.Tensor:
        """``[num_tokens]`` int32: entry of the stream that each token is, -1 where it is none."""
        found = torch.full_like(self.window_first, -1)
        entries = torch.arange(self.kept.shape[0], dtype=found.dtype, device=found.device)
        return found.index_copy_(0, self.kept, entries)

    @cached_property
    def _on_host(self) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        ranges = [(first.tolist(), limit.tolist()) for first, limit in self.ranges]
        return self.window_first.tolist(), ranges

    def parts(self, tokens_of_a_part: int) -> Iterator[Part]:
        """The tokens in parts of at most so many, and what each part sees."""
        window_first, ranges = self._on_host
        for first in range(0, self.num_tokens, tokens_of_a_part):
            stop = min(first + tokens_of_a_part, self.num_tokens)
            seen = [(firsts[first], limits[stop - 1]) for firsts, limits in ranges]
            by_all = [(firsts[stop - 1], limits[first]) for firsts, limits in ranges]
            windows = tuple(place - first for place in window_first[first:stop])
            yield Part(first, stop, windows, _united(seen), tuple(by_all))

    def mask(self) -> torch.Tensor:
        """``[num_tokens, num_tokens]`` bool, rows are queries. For comparison: it is quadratic."""
        return self.mask_of(torch.arange(self.num_tokens, device=self.window_first.device))

    def mask_of(self, places: torch.Tensor) -> torch.Tensor:
        """``[num_queries, num_tokens]`` bool: what queries at ``places`` see."""
        place = torch.arange(self.num_tokens, device=self.window_first.device)
        seen = (place >= self.window_first[places, None]) & (place <= places[:, None])
        entry = torch.arange(self.kept.shape[0], device=self.kept.device)
        for first, limit in self.ranges:
            in_range = (entry >= first[places, None]) & (entry < limit[places, None])
            seen[:, self.kept] |= in_range
        return seen

    def to(self, device: torch.device | str) -> PackedPlan:
        """The same on another device."""
        sinks = None if self.sinks is None else self.sinks.to(device)
        kept, window_first = self.kept.to(device), self.window_first.to(device)
        return PackedPlan(kept, window_first, self.stream.to(device), sinks)

    def check(self) -> None:
        """Raise ValueError where the plan breaks a promise of its own; it looks at all of it."""
        for name, ends in (("window_first", self.window_first[None]), ("kept", self.kept[None])):
            if (ends.diff() < 0).any():
                raise ValueError(f"{name} decreases: it may not")
        place = torch.arange(self.num_tokens, device=self.window_first.device)
        if (self.window_first > place).any() or (self.window_first < 0).any():
            raise ValueError("window_first lies outside the text: each token must see itself")
        for ends in self.ranges:
            first, limit = ends
            if ends.shape != (2, self.num_tokens) or (ends.diff() < 0).any():
                raise ValueError("ranges of the stream decrease, or are not [2, num_tokens]")
            if (first < 0).any() or (limit > self.kept.shape[0]).any() or (first > limit).any():
                raise ValueError(f"ranges of the stream must lie in its {len(self.kept)} entries")
        if int(self.mask().sum()) != self.num_pairs:
            raise ValueError("a token sees another one twice")


@dataclass(frozen=True)
class Part:
    """Tokens ``[first, stop)`` and all that any of them sees.

    Attributes:
        first, stop: places.
        windows: where the window of each token begins, counted from ``first``.
        entries: ranges of the stream, rising, apart from each other.
        entries_of_all: what of it each of the tokens sees, rising; a range may be empty.
    """

    first: int
    stop: int
    windows: tuple[int, ...]
    entries: tuple[tuple[int, int], ...]
    entries_of_all: tuple[tuple[int, int], ...]

    @property
    def num_entries(self) -> int:
        """Of the stream that it sees."""
        return sum(stop - first for first, stop in self.entries)

    @property
    def window_first(self) -> int:
        """First place of all windows."""
        return self.first + self.windows[0]


def _seen_by(num_entries: int, first: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Tokens with ``first <= entry < limit``, by entry: one run, since neither end decreases."""
    entry = torch.arange(num_entries, device=first.device, dtype=first.dtype)
    ends = limit.contiguous(), first.contiguous()
    return torch.stack([torch.searchsorted(end, entry, right=True, out_int32=True) for end in ends])


def _united(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges as few as possible, empty ones left out; given in rising order."""
    found: list[tuple[int, int]] = []
    for first, stop in ranges:
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        elif first < stop:
            found.append((first, stop))
    return tuple(found)
