"""Requests with a seed whose prompt takes several steps, which vLLM's CPU runner cannot compute."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def draw_for_answers_only(runner: GPUModelRunner) -> None:
    """Draw from the generator of a request with a seed only where a token of its answer is due.

    Why: a step that computes a part of a prompt samples a token as well, and throws it away. The V1
    runner then turns the request's generator back by what a CUDA kernel has drawn. A generator on a
    CPU cannot be turned back: it raises, which ends the engine.

    The ``sample_tokens`` of this runner is replaced by one that delegates to it. Meanwhile the
    generators of such requests are out of the runner's reach, so their tokens are drawn without
    one. An answer is then the same in however many steps its prompt is computed.

    Not needed once vLLM's CPU runner samples nothing for such requests, or once V1 is gone: V2
    makes its noise from the seed and the position.
    """
    sample_tokens = runner.sample_tokens

    @wraps(sample_tokens)
    def sample(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        is_thrown_away = runner.discard_request_mask.np
        hidden = {row: g for row, g in generators.items() if is_thrown_away[row]}
        for row in hidden:
            del generators[row]
        try:
            return sample_tokens(*args, **kwargs)
        finally:
            generators.update(hidden)

    setattr(runner, sample_tokens.__name__, sample)
