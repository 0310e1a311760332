"""Changes to vLLM for which it has no seam.

Each says why it is needed, which symbol it changes and when it can go. It delegates to the
original, and is applied only in a process whose configuration selects SEPLLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError

PATCHED = "_patched_by_sepllm"


def tell_clients_why() -> None:
    """Let HTTP clients read why the scheduler ended their request. Idempotent.

    Why: the scheduler alone knows that a request does not fit, and says so in ``stop_reason``
    beside ``finish_reason="error"``. vLLM's server answers every such output with status 500
    and "Internal server error". ``Platform.validate_request`` comes too early: it sees neither
    the configuration nor tokens not generated yet, and the number of blocks a server knows is
    the sum over data-parallel replicas.

    Changes ``vllm.v1.engine.async_llm.AsyncLLM.generate``, which every server endpoint reads
    from: an output that ended with an error and a reason raises a ``VLLMValidationError``, which
    is status 400, or an error event in a stream, with the reason as its message.

    Not needed once vLLM's server passes on the ``stop_reason`` of an error
    (``GenerateBaseServing._raise_if_error``).
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.generate
    if getattr(original, PATCHED, False):
        return

    @wraps(original)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        # Closed when we raise, so that other samples of the request (n > 1) are aborted.
        async with aclosing(original(self, *args, **kwargs)) as outputs:
            async for output in outputs:
                for sample in output.outputs:
                    if sample.finish_reason == "error" and isinstance(sample.stop_reason, str):
                        raise VLLMValidationError(sample.stop_reason)
                yield output

    setattr(generate, PATCHED, True)
    AsyncLLM.generate = generate
