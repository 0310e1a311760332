"""What the scheduler's process counts for the metrics.

Counts go to the process that serves requests with each step, as differences to the step before;
``engine/metrics.py`` adds them up there. vLLM's ``SchedulerStats`` has no room for a plugin's.
Under SepLLM there is no encoder-cache connector, so its dictionary carries ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.metrics.stats import SchedulerStats

STATS_KEY = "sepllm"
# Kinds of KV-cache groups; the last one is of dense layers.
WINDOW, KEPT, FULL = GROUPS = ("window", "kept", "full")
# What a request may not fit into.
MEMORY, POSITIONS = LIMITS = ("memory", "positions")
# Pages held are counted no more often than this, and in no more than this share of the time.
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


class PagesHeld:
    """Counts the pages that requests hold, now and then.

    Every page is looked at, so how often it is done depends on how long it takes.

    Args:
        managers: of all groups, with the kind of each.
    """

    def __init__(self, managers: Iterable[tuple[str, SingleTypeKVCacheManager]]) -> None:
        self._managers = list(managers)
        self._due = 0.0

    def count(self, is_last: bool) -> dict[str, int] | None:
        """Different pages held, by kind of group; ``None`` if it is not time yet.

        Args:
            is_last: no request is left, so no later step would say that nothing is held.
        """
        start = monotonic()
        if start < self._due and not is_last:
            return None
        held = dict.fromkeys((kind for kind, _ in self._managers), 0)
        for kind, manager in self._managers:
            lists = manager.req_to_blocks.values()
            held[kind] += len({p.block_id for pages in lists for p in pages if not p.is_null})
        end = monotonic()
        self._due = end + max(SECONDS_BETWEEN, (end - start) / LARGEST_SHARE)
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
