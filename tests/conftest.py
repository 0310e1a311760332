"""Shared set-up. One small engine at a time lives in the test process itself."""

from __future__ import annotations

import os

# Before vLLM or torch is imported anywhere. One thread: these machines are small and shared, and
# threads that spin for each other cost more than they give on models this size.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    VLLM_NO_USAGE_STATS="1",
)

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import MODEL, Engine, book_tokens


@pytest.fixture(scope="session")
def book() -> list[int]:
    """Token ids of a PG19 book, as the demo model's tokenizer cuts it."""
    return book_tokens()


@pytest.fixture(scope="session")
def reference_model() -> Any:
    """The demo model in Hugging Face transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="session")
def separator_ids() -> tuple[int, ...]:
    """Separators of the demo model under default options."""
    from helpers import find_separators

    return find_separators()


@pytest.fixture(scope="session")
def engines() -> Iterator[Any]:
    """Engines by their options; asking for another shuts the last one down."""
    keeper = EngineKeeper()
    yield keeper.get
    keeper.close()


class EngineKeeper:
    """Holds one engine, so that consecutive tests with the same options share it."""

    def __init__(self) -> None:
        self._options: dict[str, Any] | None = None
        self._engine: Engine | None = None

    def get(self, **options: Any) -> Engine:
        if self._engine is None or options != self._options:
            self.close()
            self._engine, self._options = Engine(**options), options
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
