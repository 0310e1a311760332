"""The share of tokens kept in the traffic, beside the one that memory is planned for."""

from __future__ import annotations

from vllm_sepllm.planning import Plan

FEWEST_TOKENS = 10_000  # before the traffic is compared with the plan
TOLERANCE = 0.25  # of the planned share


class TrafficShare:
    """Counts tokens of requests that have ended; warns once if the plan was for another text.

    Args:
        plan: what memory is planned for; ``None`` where the share says little about memory.
    """

    def __init__(self, plan: Plan | None) -> None:
        self._plan = plan
        self._num_kept = self._num_tokens = 0

    @property
    def seen(self) -> float | None:
        """Kept tokens per token of all requests that have ended; ``None`` before the first."""
        return self._num_kept / self._num_tokens if self._num_tokens else None

    def add(self, num_kept: int, num_tokens: int) -> str | None:
        """Count the tokens of a request behind its sinks; the warning, when it is due."""
        self._num_kept += num_kept
        self._num_tokens += num_tokens
        plan = self._plan
        if plan is None or self._num_tokens < FEWEST_TOKENS:
            return None
        seen, planned = self._num_kept / self._num_tokens, plan.share
        if abs(seen - planned) <= TOLERANCE * planned:
            return None
        self._plan = None  # it has been said
        effect = "fewer requests fit than planned" if seen > planned else "more requests fit"
        return (
            f"SepLLM attention: {seen:.1%} of {self._num_tokens:,} tokens of the traffic are kept, "
            f"memory is planned for {planned:.1%} ({plan.source}), so {effect}: set "
            f"planned_kept_share to {max(seen, 0.001):.3f}, or planning_text to a file of such text"
        )
