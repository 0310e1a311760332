"""Training under SepLLM beside dense attention, in one run: attention alone, and whole steps.

    python benchmarks/training.py [--lengths 1024,2048,4096,8192]

Text is a book of the repository in GPT-NeoX-20B's tokens, separators are the paper's nine.

* Attention, forward and backward: 4 heads of 64 (12 on a GPU), window 256.
* A whole step of a decoder (forward, loss, backward, without the optimizer): Llama of 5M
  parameters with a window of 64, and two layers of Pythia-160M's shape with one of 128.

Both run beside causal SDPA and SDPA under the mask, which is made before and added to the logits
(torch would make that of a bool mask in each layer). A step under SepLLM makes its plan. On a GPU
``--flex`` adds FlexAttention: attention in the text's order and in the packed one, steps in the
text's. It has no backward pass on a CPU.

A CPU computes one text at a time, a GPU as many as have 65,536 tokens. Ways take turns, and each
one's fastest turn counts. Operations are counted beside it, against causal attention and in the
paper's way.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from record import ROOT, processor, provenance, write
from rich.console import Console
from rich.table import Table
from sepllm_kernels.sequence.packed import PackedPlan, packed_attention
from tokenizers import Tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.training import apply
from vllm_sepllm.training.flops import ModelSize, shares
from vllm_sepllm.training.plan import TextPlan, pack

OUTPUT = ROOT / "benchmarks/results/training.json"
SEPARATORS = (2, 13, 15, 27, 28, 32, 186, 187, 209)  # as the authors list them for this tokenizer
VOCABULARY = 50304
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOKENS_OF_A_BATCH = 65536 if DEVICE == "cuda" else 1
NUM_HEADS = 12 if DEVICE == "cuda" else 4
DENSE, PACKED, MASKED = "dense, causal", "packed", "dense under the mask"
FLEX, FLEX_IN_ORDER = "FlexAttention, packed", "FlexAttention, order of the text"


class Effort(NamedTuple):
    """How long a row is measured, at the least: turns that count, and seconds of all ways."""

    turns: int
    seconds: float


def llama_5m() -> Any:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def pythia(num_layers: int, vocabulary: int = VOCABULARY) -> Any:
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        intermediate_size=3072,
        rotary_pct=0.25,
        max_position_embeddings=65536,
    )
    return GPTNeoXForCausalLM(config)


def book() -> list[int]:
    with gzip.open(ROOT / "tests/data/20B_tokenizer.json.gz", "rt", encoding="utf8") as file:
        tokenizer = Tokenizer.from_str(file.read())
    ids: list[int] = tokenizer.encode((ROOT / "examples/data/860.txt").read_text()).ids
    return ids[5000:]


def texts_of(ids: Sequence[int], length: int) -> np.ndarray:
    """``[texts, length]``: no text begins as another does."""
    count = max(1, TOKENS_OF_A_BATCH // length)
    longer = np.tile(ids, 2 + length // len(ids))
    return np.stack([longer[at : at + length] for at in (997 * i for i in range(count))])


def rule_of(window: int) -> KeepRule:
    options = {"window_size": window, "separator_token_ids": SEPARATORS}
    return KeepRule.of(SepLLMConfig.from_dict(options), VOCABULARY)


def in_vocabulary(texts: np.ndarray, vocabulary: int) -> np.ndarray:
    """For a smaller vocabulary, other tokens than separators become some that are none."""
    if vocabulary == VOCABULARY:
        return texts
    return np.where(np.isin(texts, SEPARATORS), texts, 300 + texts % (vocabulary - 300))


def plan_of(texts: np.ndarray, window: int) -> PackedPlan:
    """What each token of ``[texts, length]`` sees."""
    rule = rule_of(window)
    return pack([TextPlan.of(text, rule) for text in texts], DEVICE)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def fastest(ways: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, float]:
    """Seconds of each way's fastest turn; the first does not count."""
    found = dict.fromkeys(ways, float("inf"))
    turn, started = 0, time.perf_counter()
    while turn <= effort.turns or time.perf_counter() - started < effort.seconds:
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            wait()
            if turn:
                found[name] = min(found[name], time.perf_counter() - began)
        turn += 1
    return found


def attention_ways(
    plan: PackedPlan, num_texts: int, num_heads: int, size: int, with_flex: bool = False
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Forward and backward passes over texts of equal length; they return the gradients."""
    shape, length = (plan.num_tokens, num_heads, size), plan.num_tokens // num_texts
    torch.manual_seed(0)
    made = [torch.randn(shape, dtype=DTYPE, device=DEVICE) for _ in range(4)]
    tensors, grad = [tensor.requires_grad_() for tensor in made[:3]], made[3]
    sdpa, scale = torch.nn.functional.scaled_dot_product_attention, size**-0.5

    def passes(attend: Callable[..., torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            return list(torch.autograd.grad(attend(*tensors), tensors, grad))

        return run

    def by_text(attend: Callable[..., torch.Tensor], **options: Any) -> Callable[..., Any]:
        """Of ``[texts, heads, length, size]``."""

        def call(*given: torch.Tensor) -> torch.Tensor:
            heads = [x.view(num_texts, length, num_heads, size).transpose(1, 2) for x in given]
            return attend(*heads, scale=scale, **options).transpose(1, 2).reshape(shape)

        return passes(call)

    ways = {
        DENSE: by_text(sdpa, is_causal=True),
        PACKED: passes(lambda *given: packed_attention(*given, plan, scale)),
        MASKED: by_text(sdpa, attn_mask=masks_of(plan, num_texts)),
    }
    if with_flex:
        from sepllm_kernels.sequence.packed import flex
        from torch.nn.attention.flex_attention import flex_attention

        blocks = flex.block_mask(plan)
        ways[FLEX] = passes(
            lambda *given: flex.packed_attention_flex(*given, plan, scale, blocks=blocks)
        )
        attend = torch.compile(flex_attention)
        ways[FLEX_IN_ORDER] = by_text(attend, block_mask=blocks_of(plan, num_texts))
    return ways


def masks_of(plan: PackedPlan, num_texts: int) -> torch.Tensor:
    """``[texts, 1, length, length]``: 0 where a token sees, minus infinity elsewhere."""
    places = torch.arange(plan.num_tokens, device=DEVICE).view(num_texts, -1)
    seen = torch.stack([plan.mask_of(own)[:, own] for own in places])[:, None]
    return torch.zeros(seen.shape, dtype=DTYPE, device=DEVICE).masked_fill_(~seen, -math.inf)


def blocks_of(plan: PackedPlan, num_texts: int) -> Any:
    """The same mask for FlexAttention, in the order of the texts."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = plan.num_tokens // num_texts
    flags = torch.zeros(plan.num_tokens, dtype=torch.bool, device=DEVICE)
    flags[plan.kept] = True
    flags, first = flags.view(num_texts, length), plan.window_first.view(num_texts, length)

    def seen(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (flags[b, k] | (b * length + k >= first[b, q]))

    return create_block_mask(seen, num_texts, None, length, length, device=DEVICE)


def measure_attention(
    ids: Sequence[int], lengths: Sequence[int], effort: Effort, with_flex: bool
) -> list[Any]:
    rows = []
    for length in lengths:
        texts = texts_of(ids, length)
        plan = plan_of(texts, 256)
        found = fastest(attention_ways(plan, len(texts), NUM_HEADS, 64, with_flex), effort)
        pairs = plan.num_pairs / (len(texts) * length * (length + 1) / 2)
        row = {"tokens": length, "texts": len(texts), "heads": NUM_HEADS, "window": 256}
        rows.append({**row, "pairs": pairs, "seconds": found})
        print(f"attention, {length:,} tokens: {shown(found)}", flush=True)
    return rows


def step_ways(
    model: Any, window: int, ids: torch.Tensor, plan: PackedPlan, with_flex: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Whole steps of copies of the model on ``ids`` ``[texts, length]``."""
    masks: dict[str, Any] = {DENSE: None, PACKED: None, MASKED: masks_of(plan, len(ids))}
    if with_flex:
        masks[FLEX_IN_ORDER] = blocks_of(plan, len(ids))
    ways: dict[str, Callable[[], torch.Tensor]] = {}
    for name, mask in masks.items():
        own = copy.deepcopy(model).to(DEVICE, DTYPE)
        own.set_attn_implementation("flex_attention" if name == FLEX_IN_ORDER else "sdpa")
        if name == PACKED:
            apply(own, {"window_size": window, "separator_token_ids": SEPARATORS})
        ways[name] = partial(step, own, ids, mask)
    return ways


def step(model: Any, ids: torch.Tensor, mask: Any) -> torch.Tensor:
    """Gradients of a batch; the loss is returned."""
    model.zero_grad(set_to_none=True)
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    loss: torch.Tensor = model(**given).loss
    loss.backward()
    return loss.detach()


def measure_steps(
    ids: Sequence[int], lengths: Sequence[int], effort: Effort, with_flex: bool
) -> list[Any]:
    models: dict[str, tuple[Callable[[], Any], int]] = {
        "Llama, 5M": (llama_5m, 64),
        "Pythia-160M, 2 layers": (lambda: pythia(2), 128),
    }
    if DEVICE == "cuda":
        models["Pythia-160M"] = (lambda: pythia(12), 128)
    rows = []
    for name, (make, window) in models.items():
        torch.manual_seed(0)
        model = make()
        size = ModelSize.of(model)
        for length in lengths:
            text = in_vocabulary(texts_of(ids, length), model.config.vocab_size)
            plan = plan_of(text, window)
            text = torch.from_numpy(text).to(DEVICE)
            found = fastest(step_ways(model, window, text, plan, with_flex), effort)
            counted = shares(size, length, round(plan.num_pairs / len(text)))
            row = {"model": name, "tokens": length, "texts": len(text), "window": window}
            row |= {"pairs": counted["attention"], "operations": counted}
            rows.append({**row, "seconds": found})
            print(f"{name}, {length:,} tokens: {shown(found)}", flush=True)
    return rows


def shown(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {1000 * seconds:,.1f} ms" for name, seconds in found.items())


def show(result: dict[str, Any]) -> None:
    console = Console(width=150)
    rows = [("attention", row) for row in result["attention"]]
    rows += [(row["model"], row) for row in result["steps"]]
    measured = {way for _, row in rows for way in row["seconds"]}
    ways = [way for way in (DENSE, MASKED, FLEX, FLEX_IN_ORDER) if way in measured]
    table = Table("", "tokens", "pairs seen", *(f"times faster than {way}" for way in ways))
    table.add_column("operations of causal")
    table.add_column("paper's way")
    for name, row in rows:
        seconds, counted = row["seconds"], row.get("operations", {})
        faster = [f"{seconds[w] / seconds[PACKED]:.2f}" if w in seconds else "" for w in ways]
        counts = [f"{counted[k]:.1%}" if counted else "" for k in ("causal", "as in the paper")]
        table.add_row(name, f"{row['tokens']:,}", f"{row['pairs']:.1%}", *faster, *counts)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--turns", type=int, default=3, help="of each way, at least")
    parser.add_argument("--seconds", type=float, default=30, help="of a row, at least")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, on a GPU")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    if given.flex and DEVICE != "cuda":
        parser.error(
            "--flex needs a GPU (FlexAttention has no backward pass on a CPU); leave it out"
        )
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    effort = Effort(given.turns, given.seconds)
    ids, lengths = book(), [int(length) for length in given.lengths.split(",")]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result = {**provenance("torch", "transformers", "triton"), "device": device}
    result |= {**processor(), "threads": torch.get_num_threads()}
    result["attention"] = measure_attention(ids, lengths, effort, given.flex)
    result["steps"] = measure_steps(ids, lengths, effort, given.flex)
    write(given.output, result)
    show(json.loads(given.output.read_text()))


if __name__ == "__main__":
    main()
