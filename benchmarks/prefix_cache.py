"""Share of prompt tokens served by the prefix cache on a multi-turn chat trace.

    PYTHONPATH=tests/support:tools .venv/bin/python benchmarks/prefix_cache.py

32 users, one system prompt, 8 turns each, on vLLM's own scheduler and block managers without a
model. SepLLM beside full attention with the same bytes, and with as many blocks as give the same
capacity in tokens. Deterministic. Writes ``benchmarks/results/prefix_cache.json``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import environment  # before vLLM is imported
from chat_trace import BLOCK_SIZE, ChatTrace, Replay
from rich.console import Console
from rich.table import Table

assert environment
RESULTS = Path(__file__).parent / "results/prefix_cache.json"
MEMORY = (0.15, 0.25, 0.35, 0.5, 0.75)
WINDOWS = (64, 256)


def measure(trace: ChatTrace) -> list[dict[str, float]]:
    rows = []
    for memory in MEMORY:
        blocks = int(memory * len(trace) / BLOCK_SIZE)
        full = Replay(trace, None, blocks)
        full_share = full.run()
        for window in WINDOWS:
            options = {"window_size": window}
            same_bytes = Replay(trace, options, blocks)
            fewer = int(blocks * full.capacity / same_bytes.capacity)
            rows.append(
                {
                    "memory": memory,
                    "window": window,
                    "blocks": blocks,
                    "full": full_share,
                    "same_bytes": same_bytes.run(),
                    "same_tokens_blocks": fewer,
                    "same_tokens": Replay(trace, options, fewer).run(),
                }
            )
    return rows


def main() -> None:
    import importlib.metadata

    logging.disable(logging.WARNING)
    trace = ChatTrace.make()
    rows = measure(trace)
    table = Table("memory", "window", "full", "same bytes", "ratio", "same tokens", "ratio")
    for row in rows:
        full, same_bytes, same_tokens = row["full"], row["same_bytes"], row["same_tokens"]
        table.add_row(
            f"{row['memory']:.0%} ({row['blocks']})",
            str(row["window"]),
            f"{full:.3f}",
            f"{same_bytes:.3f}",
            f"{same_bytes / full:.2f}",
            f"{same_tokens:.3f} ({row['same_tokens_blocks']})",
            f"{same_tokens / full:.2f}",
        )
    Console().print(table)
    report = {
        "vllm": importlib.metadata.version("vllm"),
        "users": len(trace.users),
        "tokens": len(trace),
        "block_size": BLOCK_SIZE,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
