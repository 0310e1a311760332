"""Builders of kept groups outside an engine, and the batches they are given."""

from __future__ import annotations

from typing import Any

import torch
from helpers import MODEL
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sepllm.engine.scheduling.spec import KeptSpec

SINKS, WINDOW, PAGE = 2, 6, 16
NUM_PAGES = 40  # of a request
MAX_STEP_TOKENS = 64
NUM_DRAFTS = 3


def make_builders(kind: type[Any], count: int) -> list[Any]:
    """Builders of ``count`` groups, on a CPU."""
    drafts = {"num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_max": 2}
    config = EngineArgs(
        MODEL,
        max_model_len=512,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        attention_backend="sepllm",
        additional_config={"sepllm": {"window_size": WINDOW, "num_sink_tokens": SINKS}},
        speculative_config={"method": "ngram", **drafts},
    ).create_engine_config()
    spec = KeptSpec(
        block_size=PAGE,
        num_kv_heads=1,
        head_size=32,
        dtype=torch.float32,
        window_size=WINDOW,
        num_sink_tokens=SINKS,
        planned_share=0.25,
    )
    return [kind(spec, [f"layer{i}"], config, torch.device("cpu")) for i in range(count)]


def make_batch(
    lengths: list[int], stops: list[int], padding: int = 0, first_page: int = 1
) -> CommonAttentionMetadata:
    """Requests of so many tokens each, up to positions ``stops``, and as many as are padding.

    The pages of each request's stream follow one another from ``first_page`` on.
    """
    lengths, stops = [*lengths, *[0] * padding], [*stops, *[0] * padding]
    start = torch.tensor([0, *lengths]).cumsum(0).int()
    pages = torch.arange(first_page, first_page + len(lengths) * NUM_PAGES, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor(stops).int(),
        num_reqs=len(lengths),
        num_actual_tokens=int(start[-1]) + padding,
        max_query_len=max(lengths),
        max_seq_len=max(stops),
        block_table_tensor=pages.view(-1, NUM_PAGES),
        slot_mapping=torch.zeros(int(start[-1]) + padding, dtype=torch.int64),
    )
