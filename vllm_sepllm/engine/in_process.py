"""vLLM engines in this process, one after another, and what they hold while they answer.

The scheduler can only be read in its own process: set ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` before
vLLM is imported.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: without white space at its ends.
        num_tokens: tokens of the request in the end.
        slots: places for tokens in the pages that the request held last, over all groups of the
            cache; full attention has one for each token, and the rest of its last page.
    """

    text: str
    num_tokens: int
    slots: int


@contextmanager
def engine(model: str, options: dict[str, Any] | None, **more: Any) -> Iterator[Any]:
    """A proxy of a vLLM ``LLM``, which is gone at the end, whoever still has the proxy.

    Args:
        model: folder of a model.
        options: SepLLM's; ``None`` is vLLM's own attention.
        more: arguments of ``LLM``.
    """
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    chosen: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True}
    if options is not None:
        chosen.update(attention_backend="sepllm", additional_config={"sepllm": options})
    llm = LLM(model, **{**chosen, **more})
    try:
        yield weakref.proxy(llm)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def pages_held(llm: Any) -> dict[str, int]:
    """Pages of each live request, over all groups of the cache, less the empty (null) ones.

    Raises:
        RuntimeError: see :func:`slots_held`.
    """
    return _held(llm, lambda manager: 1)


def slots_held(llm: Any) -> dict[str, int]:
    """The same in places for tokens: backends differ in the tokens of a page.

    Raises:
        RuntimeError: the scheduler is in another process.
    """
    return _held(llm, lambda manager: manager.block_size)


def _held(llm: Any, size: Callable[[Any], int]) -> dict[str, int]:
    """Sum of ``size`` over the pages of each request."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise RuntimeError(
            "the scheduler is in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM "
            "is imported"
        )
    held: Counter[str] = Counter()
    for manager in core.scheduler.kv_cache_manager.coordinator.single_type_managers:
        for request_id, blocks in manager.req_to_blocks.items():
            held[request_id] += size(manager) * sum(not block.is_null for block in blocks)
    return held


def answer(llm: Any, token_ids: list[int], max_tokens: int) -> Answer:
    """The model's greedy answer to one prompt, with nothing else running."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    llm.llm_engine.add_request("0", {"prompt_token_ids": token_ids}, params)
    slots, outputs = 0, []
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        slots = sum(slots_held(llm).values()) or slots
    [found] = outputs[-1].outputs
    return Answer(found.text.strip(), len(token_ids) + len(found.token_ids), slots)
