"""Requests to one engine that is stepped by hand and checked after each step."""

from __future__ import annotations

import random
from collections import Counter

from helpers import Engine

IDLE_STEPS = 3  # in a row: too many, if something waits


class Traffic:
    """Random traffic to ``engine``; a subclass says what is asked and checks the answers.

    After each step every page must be free or held as often as it is referenced, and requests that
    wait while nothing runs must get on. At the end all pages must be back.

    Attributes:
        counts: of what happened.
        prompts: of requests that have not ended.
        preempted: length by request and how often.
    """

    def __init__(self, rng: random.Random, engine: Engine) -> None:
        self.rng, self.engine = rng, engine
        self.counts: Counter[str] = Counter()
        self.prompts: dict[str, list[int]] = {}
        self.preempted: dict[tuple[str, int], int] = {}
        self._idle_steps = 0

    def take(self, name: str, prompt: list[int], answer: list[int]) -> None:
        """Check the answer of a request that has ended at its full length."""
        raise NotImplementedError

    def arrive(self, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        name = f"r{self.counts['arrived']}"
        self.counts["arrived"] += 1
        self.prompts[name] = prompt
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        engine = self.engine.llm.llm_engine
        priority = self.rng.randint(0, 2)
        engine.add_request(name, {"prompt_token_ids": prompt}, params, priority=priority)

    def abort(self) -> None:
        """End one of the requests, whatever it is doing."""
        name = self.rng.choice(list(self.prompts))
        self.engine.abort([name])
        del self.prompts[name]
        self.counts["aborted"] += 1

    def step(self) -> None:
        outputs = self.engine.step()
        for output in outputs:
            if output.finished:
                prompt, answer = self.prompts.pop(output.request_id), output.outputs[0]
                self.counts["tokens"] += len(prompt) + len(answer.token_ids)
                self.counts["cached tokens"] += output.num_cached_tokens or 0
                self.counts[answer.finish_reason] += 1
                if answer.finish_reason == "length":
                    self.take(output.request_id, prompt, list(answer.token_ids))
        self.engine.check_integrity()
        self._check_progress(bool(outputs))
        for request in self.engine.scheduler.requests.values():
            name = request.request_id.rsplit("-", 1)[0]  # vLLM appends a random part
            for times in range(request.num_preemptions):
                self.preempted[name, times] = request.num_tokens
        self.counts["steps"] += 1

    def _check_progress(self, has_achieved: bool) -> None:
        scheduler = self.engine.scheduler
        is_idle = not has_achieved and not scheduler.running and bool(scheduler.waiting)
        self._idle_steps = self._idle_steps + 1 if is_idle else 0
        assert self._idle_steps < IDLE_STEPS, f"{list(scheduler.requests)} wait, nothing runs"

    def finish(self) -> None:
        """Run until all requests have ended; the engine is closed."""
        while self.engine.llm.llm_engine.has_unfinished_requests():
            self.step()
        pool = self.engine.pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pages were left behind"
        assert not self.prompts, "requests were lost"
        self.counts["preemptions"] = len(self.preempted)
        self.engine.close()
