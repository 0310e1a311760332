"""Streaming sessions: what vLLM's scheduler gets wrong with any attention."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class SessionScheduler(Scheduler):
    """vLLM's scheduler; a session's next turn begins behind the text that it has, no further.

    A turn of a session that waits for its user goes on later, from what was computed of it. vLLM
    0.32 counts too much or too little of it in two cases. 0.33 does not, and nothing changes there.
    """

    def _handle_stopped_request(self, request: Request) -> bool:
        """vLLM's. Where a turn stops inside drafts that were accepted, those behind its end are cut
        off, but counted as computed (vLLM pull request 44526): the next turn's first tokens would
        take their places in the cache."""
        if request.resumable:
            known = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, known)
        return super()._handle_stopped_request(request)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """vLLM's. Output of a session that is on its way when it is preempted is sampled again. If
        it ended the turn, vLLM would take the session out of its queue, and its text away."""
        super()._preempt_request(request, timestamp, drop_stale_output or request.resumable)
