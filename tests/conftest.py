"""Shared set-up. One small engine at a time lives in the test process itself."""

from __future__ import annotations

import gzip
import shutil
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import environment  # before vLLM or torch is imported
import pytest
from helpers import (
    MODEL,
    POOL_FILLING_TOKENS,
    ROOT,
    SMALL_POOL,
    SMOLLM2,
    Engine,
    Reference,
    book_tokens,
)

# The longest files, longest first: xdist gives files out in this order, and the last to end should
# be short.
LONGEST = (
    "test_gpu_path",
    "test_cache_positions",
    "test_ray",
    "test_serve",
    "test_serve_processes",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Behind one process the quick tests come first, as ``testpaths`` says."""
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def book() -> list[int]:
    """Token ids of a PG19 book, as the demo model's tokenizer cuts it."""
    return book_tokens()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The demo model's, as Transformers loads it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="session")
def pythia() -> Any:
    """GPT-NeoX-20B's tokenizer, which the Pythia models share."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    with gzip.open(ROOT / "tests/data/20B_tokenizer.json.gz", "rt", encoding="utf-8") as file:
        backend = tokenizers.Tokenizer.from_str(file.read())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2's tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    if not SMOLLM2.is_dir():
        pytest.skip("needs SmolLM2: scripts/fetch_model.py fetches it")
    return transformers.AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="session")
def reference_model() -> Any:
    """The demo model in Hugging Face transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="session")
def first_layers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, str]]:
    """A function: the demo model with so many of its layers, in Transformers, and its folder."""

    @cache
    def make(num_layers: int) -> tuple[Any, str]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            MODEL, num_hidden_layers=num_layers, dtype=torch.float32
        )
        path = tmp_path_factory.mktemp("model")
        model.save_pretrained(path)
        for file in Path(MODEL).glob("tokenizer*"):
            shutil.copy(file, path)
        return model, str(path)

    return make


@pytest.fixture(scope="session")
def separator_ids() -> tuple[int, ...]:
    """Separators of the demo model under default options."""
    from helpers import find_separators

    return find_separators()


@pytest.fixture
def added_policy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The policy that CONTRIBUTING adds as an example, by its name."""
    from vllm_sepllm import policy

    monkeypatch.setitem(policy.POLICIES, "even", None)  # taken back at the end
    run_example("def _even(", vars(policy))
    return "even"


@pytest.fixture
def added_class(monkeypatch: pytest.MonkeyPatch) -> str:
    """The keep class that CONTRIBUTING adds as an example, by its name."""
    from vllm_sepllm import keep_classes

    monkeypatch.setitem(keep_classes.KEEP_CLASSES, "hyphenated", None)
    run_example("KEEP_CLASSES[", vars(keep_classes))
    return "hyphenated"


def run_example(start: str, scope: dict[str, Any]) -> None:
    """Run CONTRIBUTING's example that begins with ``start``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = text[text.index(f"    {start}") :].partition("\n\nThe ")[0]
    exec(textwrap.dedent(example), scope)


@pytest.fixture(scope="session")
def inspected_here() -> None:
    """vLLM starts no process to look at a model."""
    environment.inspect_models_here()


@pytest.fixture(scope="session")
def engines(inspected_here: None) -> Iterator[Any]:
    """Engines by their options; asking for another shuts the last one down."""
    keeper = EngineKeeper()
    yield keeper.get
    keeper.close()


@pytest.fixture(scope="session")
def no_engine(engines: Any) -> Callable[[], None]:
    """A function that ends the engine of this process: the test makes one of its own."""
    return engines.__self__.close


@pytest.fixture(scope="session")
def reference(reference_model: Any, separator_ids: tuple[int, ...]) -> Reference:
    """The demo model under the mask of ``SMALL_POOL``."""
    options = SMALL_POOL["sepllm"]
    return Reference(
        reference_model, separator_ids, options["num_sink_tokens"], options["window_size"]
    )


@pytest.fixture
def engine(engines: Any) -> Iterator[Engine]:
    """The engine of ``SMALL_POOL``, with nothing in its cache; at the end all pages are back."""
    engine = engines(**SMALL_POOL)
    engine.llm.wake_up()  # a test that failed may have left it asleep
    assert engine.llm.reset_prefix_cache()
    yield engine
    engine.check_empty()


@pytest.fixture(params=["ample", "short"])
def intruder(request: Any, separator_ids: tuple[int, ...]) -> list[int] | None:
    """Memory is ample, or a prompt comes that takes all pages of ``SMALL_POOL``."""
    return [separator_ids[0]] * POOL_FILLING_TOKENS if request.param == "short" else None


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
        engine, self._engine = self._engine, None  # if it fails, others do not fail with it
        if engine is not None:
            engine.close()
