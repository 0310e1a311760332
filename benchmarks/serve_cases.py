"""Models, memory, traces and servers of the serving benchmark."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import shapes
from serve_traces import Chat, Documents, Short, Trace

Traces = tuple[tuple[Trace, float], ...]
NAMES = ("documents", "chat", "short")


@dataclass(frozen=True)
class Case:
    """A model, memory, and for each trace the rate to begin with, in requests per second."""

    model: str | None  # a folder; none: the Llama shape of ``make bench``, with random weights
    max_len: int
    kv_mib: int
    window: int
    traces: Traces
    max_seqs: int = 32
    chunk: int = 512

    def options(self) -> list[str]:
        """What all servers are told."""
        given = {
            "--max-model-len": self.max_len,
            "--kv-cache-memory-bytes": self.kv_mib << 20,
            "--max-num-seqs": self.max_seqs,
            "--max-num-batched-tokens": self.chunk,
            "--block-size": shapes.BLOCK_SIZE,
            "--dtype": "bfloat16",
            "--seed": 0,
            "--load-format": "auto" if self.model else "dummy",
            "--generation-config": "vllm",
        }
        flags = ["--enforce-eager", "--enable-prefix-caching"]
        return flags + [str(part) for pair in given.items() for part in pair]

    def about(self, is_cuda: bool) -> dict[str, Any]:
        """For the file of results."""
        return {
            **asdict(self),
            "traces": {t.name: {**asdict(t), "first_rate": rate} for t, rate in self.traces},
            "options": self.options(),
            "ways": ways(is_cuda, self.window),
            "shape": None if self.model else shapes.MODEL,
        }

    def only(self, names: list[str] | None) -> Case:
        """Some of the traces; none: all."""
        return replace(self, traces=tuple(t for t in self.traces if t[0].name in (names or NAMES)))


CASES = {
    "llama": Case(
        model=None,
        max_len=8192,
        kv_mib=64,
        window=256,
        traces=(
            (Documents(count=6, tokens=4000, questions=6, output_tokens=48), 0.5),
            (Chat(users=10, turns=8, output_tokens=32), 1.0),
            (Short(count=160, output_tokens=64), 4.0),
        ),
    ),
    "smollm2": Case(
        model="build/models/SmolLM2-135M-Instruct",
        max_len=4096,
        kv_mib=128,
        window=256,
        traces=(
            (Documents(count=4, tokens=1800, questions=5, output_tokens=32), 0.25),
            (Chat(users=6, turns=6, output_tokens=32), 0.5),
            (Short(count=48, output_tokens=48), 1.0),
        ),
        max_seqs=16,
    ),
}
SMOKE = {
    "demo": Case(
        model="examples/models/pg19-5m-sep",
        max_len=2048,
        kv_mib=10,
        window=64,
        traces=(
            (Documents(count=4, tokens=1200, questions=3, output_tokens=24), 64.0),
            (Chat(users=3, turns=3, output_tokens=16), 4.0),
            (Short(count=12, output_tokens=16), 8.0),
        ),
        max_seqs=16,
    )
}


def ways(is_cuda: bool, window: int) -> dict[str, list[str]]:
    """Options of each server that is compared, by its name in the results."""
    options = json.dumps({"sepllm": {"window_size": window}})
    ours = ["--attention-backend", "SEPLLM", "--additional-config", options]
    if not is_cuda:
        return {"SEPLLM": ours, "CPU_ATTN": ["--attention-backend", "CPU_ATTN"]}
    full, fp8 = ["--attention-backend", "FLASH_ATTN"], ["--kv-cache-dtype", "fp8"]
    return {
        "SEPLLM": ours,
        "FLASH_ATTN": full,
        "SEPLLM, FP8 KV": ours + fp8,
        "FLASH_ATTN, FP8 KV": full + fp8,
    }
