"""What tests share: the demo model's files, an engine stepped by hand, integrity checks."""

from __future__ import annotations

import gc
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "examples/models/pg19-5m-sep")
BOOK = ROOT / "examples/data/860.txt"


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@cache
def book_tokens() -> list[int]:
    text = BOOK.read_text(encoding="utf8")
    return tokenizer()(text[2000:60000], add_special_tokens=False).input_ids


def find_separators(**options: Any) -> tuple[int, ...]:
    from vllm_sepllm.config import SepLLMConfig
    from vllm_sepllm.separators import resolve_separators

    return resolve_separators(SepLLMConfig(**options), tokenizer()).token_ids


class Engine:
    """A vLLM engine in this process.

    Keyword arguments are vLLM's; ``sepllm`` holds the SepLLM options, ``None`` selects vLLM's
    own attention.
    """

    def __init__(
        self,
        sepllm: dict[str, Any] | None,
        model: str = MODEL,
        memory_mib: int = 64,
        **options: Any,
    ) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "block_size": 32,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": memory_mib << 20,
        }
        if sepllm is not None:
            defaults["attention_backend"] = "sepllm"
            defaults["additional_config"] = {"sepllm": sepllm}
        self.llm = LLM(model, **{**defaults, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers

    def generate(self, prompts: list[list[int]], max_tokens: int = 24, **params: Any) -> list[Any]:
        """Greedy completions, one ``RequestOutput`` per prompt."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=max_tokens, **{"temperature": 0, "ignore_eos": True, **params}
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=False)

    def tokens(self, prompts: list[list[int]], max_tokens: int = 24, **params: Any) -> list[Any]:
        """Only the token ids."""
        outputs = self.generate(prompts, max_tokens, **params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def add(self, name: str, prompt: list[int], max_tokens: int = 24) -> None:
        """Queue a request for :meth:`step`."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def step(self) -> list[Any]:
        return self.llm.llm_engine.step()

    def abort(self, names: list[str]) -> None:
        self.llm.llm_engine.abort_request(names)

    def held(self, request_id: str) -> int:
        """Pages a request holds in all groups."""
        return sum(
            sum(not block.is_null for block in manager.req_to_blocks.get(request_id, ()))
            for manager in self.managers
        )

    def check_integrity(self) -> None:
        check_integrity(self.managers, self.pool)

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm = self.core = self.scheduler = self.pool = self.managers = None
        gc.collect()
        cleanup_dist_env_and_memory()


def check_integrity(managers: Any, pool: Any) -> None:
    """Every page is free or held, shared only as often as it is referenced, none is lost."""
    holders: Counter[int] = Counter()
    for manager in managers:
        in_group: Counter[int] = Counter()
        for blocks in manager.req_to_blocks.values():
            in_group.update({block.block_id for block in blocks if not block.is_null})
        assert not holders.keys() & in_group.keys(), "a page is held in two groups"
        holders += in_group
    for block_id, count in holders.items():
        assert pool.blocks[block_id].ref_cnt == count, "references and holders differ"
    free = pool.get_num_free_blocks()
    assert free + len(holders) == pool.num_gpu_blocks - 1, "pages are lost"


def page_bound(kept: int, window: int, chunk: int, block_size: int) -> int:
    """Pages a request may hold: stream, window, and the chunk being computed."""
    pages = math.ceil(kept / block_size) + math.ceil((window - 1) / block_size) + 1
    return pages + math.ceil(chunk / block_size)


def make_kept_manager(pool: Any, sinks: int) -> Any:
    """A manager of the kept group over a real block pool, not attached to requests yet."""
    import torch

    from vllm_sepllm.engine.manager import KeptManager
    from vllm_sepllm.engine.spec import KeptSpec

    spec = KeptSpec(
        block_size=pool.hash_block_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        window_size=8,
        num_sink_tokens=sinks,
        expected_kept_share=0.2,
    )
    return KeptManager(
        spec,
        block_pool=pool,
        enable_caching=pool.enable_caching,
        kv_cache_group_id=1,
        scheduler_block_size=pool.hash_block_size,
    )
