"""vLLM engines in this process, one after another, and what they hold while they answer.

The scheduler can only be read in its own process: set ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` before
vLLM is imported.
"""

from __future__ import annotations

import atexit
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


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

    chosen: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True}
    if options is not None:
        chosen.update(attention_backend="sepllm", additional_config={"sepllm": options})
    llm = LLM(model, **{**chosen, **more})
    try:
        yield weakref.proxy(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()  # now, and not when it is collected
        del llm
        clean_up()


def clean_up() -> None:
    """Behind an engine of this process, to which nobody holds a reference any more.

    What is left alive is never searched for garbage again. vLLM has everything searched about seven
    times in the life of an engine, which takes half a second each time; it leaves out what lives
    while an engine runs, and takes that back at its end.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
    if gc.freeze is not _do_nothing and sys.exc_info()[0] is None:  # which may hold the engine
        atexit.register(gc.unfreeze)  # at the end of the process everything is
        gc.freeze()
        gc.freeze = gc.unfreeze = _do_nothing


def _do_nothing() -> None:
    pass


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


def bytes_held(llm: Any) -> dict[str, int]:
    """The same in bytes. Groups of the cache differ in the layers that a page has room for.

    Raises:
        RuntimeError: see :func:`slots_held`.
    """
    config: KVCacheConfig = _scheduler(llm).kv_cache_config
    # Each tensor names the size of the one allocation that all groups share.
    page = max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
    return {name: page * pages for name, pages in pages_held(llm).items()}


def output_lengths(llm: Any) -> dict[str, int]:
    """New tokens of each live request.

    Raises:
        RuntimeError: see :func:`slots_held`.
    """
    live: dict[str, Request] = _scheduler(llm).requests
    return {name: request.num_output_tokens for name, request in live.items()}


def _held(llm: Any, size: Callable[[Any], int]) -> dict[str, int]:
    """Sum of ``size`` over the pages of each request."""
    held: Counter[str] = Counter()
    for manager in _scheduler(llm).kv_cache_manager.coordinator.single_type_managers:
        for request_id, blocks in manager.req_to_blocks.items():
            held[request_id] += size(manager) * sum(not block.is_null for block in blocks)
    return held


def _scheduler(llm: Any) -> Scheduler:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise RuntimeError(
            "the scheduler is in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM "
            "is imported"
        )
    return core.scheduler


def run_together(
    llm: Any,
    prompts: Mapping[str, Sequence[int]],
    after_step: Callable[[Any], None],
    **params: Any,
) -> list[Any]:
    """Greedy requests that run together, to their full length.

    Args:
        llm: of :func:`engine`.
        prompts: token ids by name.
        after_step: called with ``llm`` after each step of the engine.
        params: more of vLLM's ``SamplingParams``; ``max_tokens`` is each request's length.

    Returns:
        A ``RequestOutput`` for each prompt, in their order.

    Raises:
        RuntimeError: a request ended before it should.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(**{"temperature": 0, "ignore_eos": True, **params})
    outputs: dict[str, RequestOutput] = {}
    output: RequestOutput
    for name, ids in prompts.items():
        llm.llm_engine.add_request(name, {"prompt_token_ids": list(ids)}, sampling.clone())
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            outputs[output.request_id] = output
        after_step(llm)
    for name, output in outputs.items():
        [found] = output.outputs
        if found.finish_reason != "length":
            raise RuntimeError(f"{name} ended early: {found.stop_reason or found.finish_reason}")
    return [outputs[name] for name in prompts]


def sentence_of(error: Exception) -> str:
    """What vLLM's start-up says, without pydantic's frame around it."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(e["msg"]).removeprefix("Value error, ") for e in errors())
    return str(error) or type(error).__name__


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
