"""SepLLM's metrics beside vLLM's own: on ``/metrics``, in ``LLM.get_metrics`` and in the log.

``scheduling/tally.py`` counts; this module adds up, in the process that serves requests.
``patches.show_metrics`` puts it there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from vllm_sepllm.engine.scheduling.tally import FULL, KEPT, LIMITS, WINDOW, take
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.planning import Plan

logger = init_logger(f"vllm.{__name__}")

PREFIX = "vllm:sepllm_"
LABELS = ["model_name", "engine"]
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
# By the name in a tally: the metric and its text.
COUNTERS = {
    "tokens_kept": (
        "tokens_kept",
        "Tokens that have left the window and stay in the KV cache, those that newer ones have "
        "replaced under a bound included. Counted in whole blocks, and again where a preempted "
        "request is computed again.",
    ),
    "tokens_dropped": (
        "tokens_dropped",
        "Tokens that have left the window and the KV cache. Counted as the kept ones are.",
    ),
    "copies": (
        "copies_on_write",
        "Partly filled pages of a cached prefix that were copied before they were appended to.",
    ),
    "small_chunks": (
        "requests_in_small_chunks",
        "Times that a request was put into chunks smaller than max_num_batched_tokens, as its "
        "prompt fits into the KV cache in no larger ones.",
    ),
}
# The same with one label: its name and its values.
LABELLED = {
    "returned": (
        "pages_returned",
        "Pages given back before their request ended.",
        "group",
        (WINDOW, KEPT),
    ),
    "found": (
        "prefix_hit_pages",
        "Pages that requests took over from the prefix cache.",
        "group",
        (WINDOW, KEPT),
    ),
    "refused": (
        "requests_refused",
        "Requests that ended with an error because they could not fit: into the memory of the KV "
        "cache, into the positions of the model, or as a session into max_model_len.",
        "reason",
        LIMITS,
    ),
}


class EngineMetrics:
    """The metrics of one engine.

    Args:
        metrics: by name, with the labels of vLLM's still to be set.
        labels: values of vLLM's labels.
        groups: kinds of KV-cache groups that the engine has.
        plan: what memory is planned for.
    """

    def __init__(
        self,
        metrics: dict[str, Any],
        labels: list[object],
        groups: tuple[str, ...],
        plan: Plan,
    ) -> None:
        self._counters = {name: metrics[name].labels(*labels) for name in COUNTERS}
        self._labelled = {
            name: {value: metrics[name].labels(*labels, value) for value in values}
            for name, (_, _, _, values) in LABELLED.items()
        }
        self._metrics, self._labels = metrics, labels
        for group in groups:
            metrics["held"].labels(*labels, group).set(0)
        self._shares = metrics["shares"].labels(*labels)
        metrics["planned_share"].labels(*labels).set(plan.planned_share)
        self._expected_share = plan.share
        self._since: Counter[str] = Counter()  # the last line of the log
        self._last: dict[str, Any] = {"held": dict.fromkeys(groups, 0), "seen_share": None}

    def add(self, counts: dict[str, Any]) -> None:
        """Add what :meth:`Reports.report` says."""
        for name, value in counts.items():
            if name in self._counters:
                self._counters[name].inc(value)
                self._since[name] += value
            elif name in self._labelled:
                for label, number in value.items():
                    self._labelled[name][label].inc(number)
                    self._since[name] += number
            elif name == "shares":
                for share in value:
                    self._shares.observe(share)
            else:
                self._last[name] = value
                self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        """Set gauges; there are none of what has not been reported."""
        if name == "seen_share":
            self._metrics[name].labels(*self._labels).set(value)
        else:
            for group, number in value.items():
                self._metrics[name].labels(*self._labels, group).set(number)

    def line(self) -> str | None:
        """What has happened since the last call, for people; ``None`` if nothing has."""
        since, self._since = self._since, Counter()
        if not since:
            return None
        left = since["tokens_kept"] + since["tokens_dropped"]
        share = f"{since['tokens_dropped'] / left:.1%} of " if left else ""
        held = ", ".join(f"{number:,} {group}" for group, number in self._last["held"].items())
        parts = [
            f"dropped {share}{left:,} tokens behind the window",
            f"pages held: {held}",
            f"given back early: {since['returned']:,}",
            f"from the prefix cache: {since['found']:,} ({since['copies']:,} copied)",
        ]
        if self._last["seen_share"] is not None:
            seen = self._last["seen_share"]
            parts.append(f"kept of the traffic: {seen:.1%} (planned {self._expected_share:.1%})")
        if since["small_chunks"]:
            parts.append(f"put into small chunks: {since['small_chunks']:,} requests")
        if since["refused"]:
            parts.append(f"refused: {since['refused']:,} requests")
        return ", ".join(parts)


class SepLLMStatLogger(AggregateStatLoggerBase):
    """Takes SepLLM's counts out of a step's statistics; must come before vLLM's loggers.

    Args:
        vllm_config: selects SEPLLM.
        engine_indexes: engines whose statistics come here.
        prometheus: vLLM's own logger. Its kinds of metrics are used, which Ray replaces.
        writes_lines: whether vLLM logs its statistics.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_indexes: list[int],
        prometheus: PrometheusStatLogger,
        writes_lines: bool,
    ) -> None:
        settings = Settings.of(vllm_config)
        groups = (WINDOW, KEPT, FULL) if settings.layers.dense else (WINDOW, KEPT)
        metrics = _metrics(prometheus)
        self._writes_lines = writes_lines
        self._engines = {
            index: EngineMetrics(
                metrics,
                prometheus.per_engine_labelvalues[index],
                groups,
                settings.plan,
            )
            for index in engine_indexes
        }

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add the counts of a step; vLLM's loggers do not see them."""
        counts = {} if scheduler_stats is None else take(scheduler_stats)
        engine = self._engines.get(engine_idx)
        if counts and engine is not None:
            engine.add(counts)

    def log(self) -> None:
        """One line for each engine that has done something since the last one."""
        for index, engine in self._engines.items():
            line = engine.line()
            if line is not None and self._writes_lines:
                logger.info("Engine %03d: SepLLM: %s", index, line)

    def log_engine_initialized(self) -> None:
        """Start-up has said what there is to say."""


def _metrics(prometheus: PrometheusStatLogger) -> dict[str, Any]:
    """All metrics by the name in a tally, registered where vLLM's are."""
    counter, gauge = prometheus._counter_cls, prometheus._gauge_cls
    found: dict[str, Any] = {}
    for key, (name, text) in COUNTERS.items():
        found[key] = counter(name=PREFIX + name, documentation=text, labelnames=LABELS)
    for key, (name, text, label, _) in LABELLED.items():
        found[key] = counter(name=PREFIX + name, documentation=text, labelnames=[*LABELS, label])
    gauges = {
        "held": ("pages_held", "Pages of the KV cache that requests hold.", [*LABELS, "group"]),
        "planned_share": (
            "planned_kept_share",
            "Tokens kept per token behind the sinks that memory is planned for.",
            LABELS,
        ),
        "seen_share": (
            "seen_kept_share",
            "Tokens kept per token behind the sinks, of all requests that have ended.",
            LABELS,
        ),
    }
    for key, (name, text, labels) in gauges.items():
        found[key] = gauge(
            name=PREFIX + name,
            documentation=text,
            labelnames=labels,
            multiprocess_mode="mostrecent",
        )
    found["shares"] = prometheus._histogram_cls(
        name=PREFIX + "request_kept_share",
        documentation="Tokens kept per token behind the sinks, of each request that has ended.",
        buckets=SHARES,
        labelnames=LABELS,
    )
    return found
