"""vLLM engines in this process, one after another, and what they hold while they answer.

The scheduler can only be read in its own process: set ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` before
vLLM is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: without white space at its ends.
        num_tokens: tokens of the request in the end.
        pages: pages that the request held last, over all groups of the cache.
    """

    text: str
    num_tokens: int
    pages: int


@contextmanager
def engine(model: str, options: dict[str, Any] | None, **more: Any) -> Iterator[Any]:
    """A vLLM ``LLM``, whose memory is free again at the end.

    Args:
        model: folder of a model.
        options: SepLLM's; ``None`` is vLLM's own attention.
        more: arguments of ``LLM``.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    chosen: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True}
    if options is not None:
        chosen.update(attention_backend="sepllm", additional_config={"sepllm": options})
    llm = LLM(model, **{**chosen, **more})
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def pages_held(llm: Any) -> dict[str, int]:
    """Pages of each live request, over all groups of the cache, less the empty (null) ones.

    Raises:
        RuntimeError: the scheduler is in another process.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise RuntimeError(
            "the scheduler is in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM "
            "is imported"
        )
    held: dict[str, int] = {}
    for manager in core.scheduler.kv_cache_manager.coordinator.single_type_managers:
        for request_id, blocks in manager.req_to_blocks.items():
            pages = sum(not block.is_null for block in blocks)
            held[request_id] = held.get(request_id, 0) + pages
    return held


def chat_ids(tokenizer: Any, message: str) -> list[int]:
    """Token ids of a chat of one message, up to where the model answers."""
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def answer(llm: Any, message: str, max_tokens: int) -> Answer:
    """The model's greedy answer to one message, with nothing else running."""
    from vllm import SamplingParams

    ids = chat_ids(llm.get_tokenizer(), message)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    llm.llm_engine.add_request("0", {"prompt_token_ids": ids}, params)
    pages, outputs = 0, []
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        pages = sum(pages_held(llm).values()) or pages
    [found] = outputs[-1].outputs
    return Answer(found.text.strip(), len(ids) + len(found.token_ids), pages)
