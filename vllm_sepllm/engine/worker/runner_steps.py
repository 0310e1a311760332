"""The steps of vLLM's V1 runner, for which it has no seam: row of each request, ids of its tokens.

What is final when, in vLLM 0.32 and 0.33:

- A new request's ``prompt_token_ids``: all of it. The prefix found in the cache is part of it. The
  next turn of a session is sent as a new request under the same id, with all turns in its prompt.
  When a turn ends, our scheduler lists the session as preempted, so that it holds no row.
- A resumed request's ``all_token_ids``, and those of a request that sat out a step: the scheduler's
  own. What is computed of a resumed request are pages of the prefix cache, whose ids are known; it
  resumes when no output from before its preemption is on its way.
- The runner's ``token_ids_cpu`` and ``output_token_ids``: not with asynchronous scheduling. A
  generated token is -1 there. Nothing is read from them.
- The model's input of a step on the device: for good once the runner has prepared its inputs, which
  is before builders run. Drafts among it may be rejected: the next step writes their counts again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_sepllm.engine.worker.counts import Counts, computed_ids

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class RunnerSteps:
    """Told of each step before the runner prepares it, then asked by builders, who change nothing.

    Args:
        counts: of all requests.
        runner: its order of requests and its input are read.
    """

    def __init__(self, counts: Counts, runner: GPUModelRunner) -> None:
        self._counts = counts
        self._runner = runner
        self._held: dict[str, int] = {}
        self._free = list(range(len(counts)))
        self._is_running = False
        self._step: Any = None

    def follow(self) -> None:
        """Be told of the runner's steps from now on.

        Its ``execute_model`` is replaced by one that delegates to it. That of a worker would be
        vLLM's own seam, but an executor of 0.32 passes it by: Ray's compiled graph
        (``VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0``) calls the runner's. Once 0.32 is not supported, a
        worker's will do. Once the V1 runner is gone, neither is needed: V2 has model states.
        """
        execute_model = self._runner.execute_model

        @wraps(execute_model)
        def followed(scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
            with self.during(scheduler_output):
                return execute_model(scheduler_output, *args, **kwargs)

        setattr(self._runner, execute_model.__name__, followed)

    @contextmanager
    def during(self, scheduled: SchedulerOutput) -> Iterator[None]:
        """A step. Rows are given back, taken and restarted at its beginning, at no other time."""
        self._begin(scheduled)
        self._is_running = bool(scheduled.num_scheduled_tokens)
        try:
            yield
        finally:
            self._is_running, self._step = False, None

    def current(self) -> Any:
        """The running step, one object for all builders (see :meth:`Counts.step`).

        ``None`` between steps: a batch is then of vLLM's own making, and its requests are none.
        """
        if self._step is None and self._is_running:
            token_ids = self._runner.input_ids.gpu
            rows = [self._held[r] for r in self._runner.input_batch.req_ids]
            index = async_tensor_h2d(rows, token_ids.device, torch.int64)
            self._step = self._counts.step(index, token_ids)
        return self._step

    def _begin(self, scheduled: SchedulerOutput) -> None:
        for req_id in (*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())):
            self._release(req_id)
        for new in scheduled.scheduled_new_reqs:
            self._restart(new.req_id, new.prompt_token_ids, new.num_computed_tokens)
        cached = scheduled.scheduled_cached_reqs
        for req_id, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if req_id in cached.resumed_req_ids or req_id not in self._held:
                self._restart(req_id, cached.all_token_ids.get(req_id), num_computed)

    def _restart(self, req_id: str, token_ids: Sequence[int] | None, num_computed: int) -> None:
        if req_id not in self._held:
            assert self._free, "a step has more requests than rows"
            self._held[req_id] = self._free.pop()
        self._counts.restart(self._held[req_id], computed_ids(req_id, token_ids, num_computed))

    def _release(self, req_id: str) -> None:
        row = self._held.pop(req_id, None)
        if row is not None:
            self._free.append(row)
