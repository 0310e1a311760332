"""What the scheduler's process counts for the metrics.

Counts go to the process that serves requests, as differences to the report before;
``engine/metrics.py`` adds them up there. vLLM's ``SchedulerStats`` has no room for a plugin's.
Under SepLLM there is no encoder-cache connector, so its dictionary carries ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from time import monotonic
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.metrics.stats import SchedulerStats

STATS_KEY = "sepllm"
# Kinds of KV-cache groups. Full ones are of dense layers, others of a model's own kinds of layers.
WINDOW, KEPT, FULL, OTHER = "window", "kept", "full", "other"
# What a request may not fit into.
MEMORY, POSITIONS, LENGTH = LIMITS = ("memory", "positions", "length")
# Reports come no more often than this, and take no more than this share of the time.
SECONDS_BETWEEN = 0.5
LARGEST_SHARE = 1 / 500


@dataclass
class Tally:
    """Counts since they were last taken.

    Attributes:
        tokens_kept: tokens that have left the window and stay in the stream.
        tokens_dropped: tokens that have left the window, and the KV cache.
        copies: pages copied before they were appended to.
        small_chunks: requests that were put into small chunks.
        returned: pages given back before their request ended, by kind of group.
        found: pages taken over from the prefix cache, by kind of group.
        refused: requests ended because they could not fit, by what they did not fit into.
        shares: of each request that has ended, the tokens kept per token behind its sinks.
    """

    tokens_kept: int = 0
    tokens_dropped: int = 0
    copies: int = 0
    small_chunks: int = 0
    returned: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    shares: list[float] = field(default_factory=list)

    def take(self) -> dict[str, Any]:
        """What is not zero, as plain values by name; then all counts are zero again."""
        counts = {name: value for name, value in vars(self).items() if value}
        if counts:
            self.__init__()  # type: ignore[misc]
        return {n: dict(v) if isinstance(v, Counter) else v for n, v in counts.items()}


class Reports:
    """Counts and pages held, now and then: every page is looked at, and every counter is set.

    Args:
        tally: what is counted.
        managers: of all groups, with the kind of each.
    """

    def __init__(
        self, tally: Tally, managers: Iterable[tuple[str, SingleTypeKVCacheManager]]
    ) -> None:
        self._tally, self._managers = tally, list(managers)
        self._due = 0.0

    def report(self, is_last: bool, seen_share: float | None) -> dict[str, Any] | None:
        """What was counted since the last report, and pages held; ``None`` if it is not time yet.

        Args:
            is_last: no request is left, so no later step would say what this one has to.
            seen_share: kept tokens per token of all requests that have ended.
        """
        start = monotonic()
        if start < self._due and not is_last:
            return None
        counts = self._tally.take()
        if "shares" in counts:
            counts["seen_share"] = seen_share
        counts["held"] = self._held()
        end = monotonic()
        self._due = end + max(SECONDS_BETWEEN, (end - start) / LARGEST_SHARE)
        return counts

    def _held(self) -> dict[str, int]:
        """Different pages that requests hold, by kind of group."""
        held = dict.fromkeys((kind for kind, _ in self._managers), 0)
        for kind, manager in self._managers:
            lists = manager.req_to_blocks.values()
            if kind == WINDOW:  # null pages up to the window: as many as a long text has blocks
                lists = [takewhile(lambda page: not page.is_null, reversed(p)) for p in lists]
            held[kind] += len({p.block_id for pages in lists for p in pages if not p.is_null})
        return held


def put(stats: SchedulerStats, counts: dict[str, Any]) -> None:
    """Let a step's statistics carry ``counts``."""
    stats.ec_connector_stats = {**(stats.ec_connector_stats or {}), STATS_KEY: counts}


def take(stats: SchedulerStats) -> dict[str, Any]:
    """Take out again what :func:`put` put in: vLLM's loggers expect a connector behind it."""
    carried = stats.ec_connector_stats
    if not carried or STATS_KEY not in carried:
        return {}
    counts: dict[str, Any] = carried.pop(STATS_KEY)
    stats.ec_connector_stats = carried or None
    return counts
