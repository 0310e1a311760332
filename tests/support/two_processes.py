"""Run as a script: an engine of several processes answers the same prompts cold and warm.

    python tests/support/two_processes.py PROMPTS.json '{"tensor_parallel_size": 2}'

Options are vLLM's and, as ``sepllm``, ours, on top of those below. What it prints is for
:func:`check`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from helpers import MODEL

NEW_TOKENS = 24
MARK = "ANSWER"


def main(
    prompts: list[list[int]],
    sepllm: dict[str, Any] | None = None,
    model: str = MODEL,
    **options: Any,
) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        attention_backend="sepllm",
        additional_config={"sepllm": {"window_size": 64, **(sepllm or {})}},
        dtype="float32",
        max_model_len=2048,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=64 << 20,
        **options,
    )
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    for _ in range(2):
        outputs = llm.generate(inputs, params, use_tqdm=False)
        answer = [[list(o.outputs[0].token_ids), o.num_cached_tokens] for o in outputs]
        print(f"\n{MARK}{json.dumps(answer)}", flush=True)


def check(
    shown: str, prompts: list[list[int]], check_answer: Callable[[list[int], list[int]], None]
) -> None:
    """Both answers pass ``check_answer``, and the second came from the prefix cache."""
    lines = [line for line in shown.splitlines() if line.startswith(MARK)]
    cold, warm = (json.loads(line.removeprefix(MARK)) for line in lines)
    for prompt, (tokens, cached), (again, found) in zip(prompts, cold, warm, strict=True):
        assert len(tokens) == NEW_TOKENS
        check_answer(prompt, tokens)
        assert tokens == again
        assert cached == 0
        assert found == (len(prompt) - 1) // 32 * 32


if __name__ == "__main__":
    with open(sys.argv[1]) as stream:
        given = json.load(stream)
    main(given, **json.loads(sys.argv[2]))
