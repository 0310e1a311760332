"""Streaming sessions: what vLLM's scheduler gets wrong with any attention."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class SessionScheduler(Scheduler):
    """vLLM's scheduler; a session's next turn begins behind the text that it has, no further.

    A turn of a session that waits for its user goes on later, from what was computed of it. vLLM
    0.32 counts too much or too little of it in two cases. 0.33 does not, and nothing changes there.

    A session that waits holds no row of the worker, as its next turn is sent as a new request. The
    V2 runner would keep one. vLLM counts it as running while the session waits for its user, but no
    more when the turn is in a queue: one that is passed over there, for its LoRA adapter or because
    it gave its pages back, would leave the runner with more requests than it has rows.
    """

    def _handle_stopped_request(self, request: Request) -> bool:
        """vLLM's. Where a turn stops inside drafts that were accepted, those behind its end are cut
        off, but counted as computed (vLLM pull request 44526): the next turn's first tokens would
        take their places in the cache."""
        if request.resumable:
            known = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, known)
        has_ended = super()._handle_stopped_request(request)
        if not has_ended:
            self.reset_preempted_req_ids.add(request.request_id)
        return has_ended

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """vLLM's. Output of a session that is on its way when it is preempted is sampled again. If
        it ended the turn, vLLM would take the session out of its queue, and its text away."""
        super()._preempt_request(request, timestamp, drop_stale_output or request.resumable)

    def _too_long(self, session: Request) -> str:
        """Why a session ends that has grown to the model's length, which vLLM does not look at: the
        worker would raise, and end the engine for everybody (vLLM pull request 40072)."""
        return (
            f"the {session.num_tokens} tokens of this session leave no room for an answer in "
            f"max_model_len ({self.max_model_len}): begin another session, with less of its text"
        )

    def _hold_back(self, names: Iterable[str]) -> None:
        """Start none of these sessions, which end with this step."""
        for session in (self.requests[name] for name in names if name in self.requests):
            if session.resumable:
                self.waiting.remove_requests([session])
                self.kv_holding_waiting.remove_requests([session])

    def _give_back(self, session: Request) -> None:
        """Free the pages of a turn that waits; it will be computed from its start."""
        self.kv_holding_waiting.remove_request(session)
        self.kv_cache_manager.free(session)
        session.num_computed_tokens = 0
        self._enqueue_waiting_request(session)
