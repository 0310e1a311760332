"""Model, text and sizes of the benchmarks."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.separators import resolve_separators

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests/data/20B_tokenizer.json.gz"
BOOK = ROOT / "benchmarks/data/5396.txt.gz"
WINDOW = 256
BLOCK_SIZE = 32
ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 50304,
    "max_position_embeddings": 65536,
}


def read_gzip(path: Path) -> str:
    """A compressed text file."""
    with gzip.open(path, "rt", encoding="utf8") as file:
        return file.read()


def benchmark_model() -> LlamaConfig:
    """What the CPU benchmark runs."""
    return LlamaConfig(**MODEL, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)


def write_model(path: Path, tokenizer: Tokenizer, config: PretrainedConfig) -> None:
    """A model directory for ``load_format="dummy"``: configuration and tokenizer only."""
    config.architectures = [ARCHITECTURES[config.model_type]]
    config.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        path
    )


def kv_bytes(max_len: int, max_seqs: int) -> int:
    """Memory for every case without preemption: eight requests of the longest context."""
    per_token = 2 * 2 * MODEL["num_key_value_heads"] * MODEL["head_dim"]
    per_token *= MODEL["num_hidden_layers"]
    tokens = max(8 * max_len, max_seqs * 1024)
    return int(1.1 * tokens * per_token) + (64 << 20)


@cache
def policy() -> KeepRule:
    """The default one, for the benchmarks' tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(read_gzip(TOKENIZER)))
    config = SepLLMConfig(window_size=WINDOW)
    ids = resolve_separators(config, tokenizer).token_ids
    return KeepRule.of(config.with_kept_ids(ids), MODEL["vocab_size"])


def kept_share(prompts: list[list[int]]) -> float:
    """Tokens the last query of each prompt sees, over all its tokens."""
    chosen = policy()
    seen = []
    for ids in prompts:
        start = int(chosen.window_start(len(ids) - 1))
        kept = int(chosen.kept_flags(ids[:start]).sum())
        seen.append((kept + len(ids) - start) / len(ids))
    return float(np.mean(seen))


@cache
def book_ids() -> npt.NDArray[np.int64]:
    """The book in tokens."""
    return np.array(Tokenizer.from_str(read_gzip(TOKENIZER)).encode(read_gzip(BOOK)).ids)


def kept_flags(num_texts: int, num_tokens: int, num_sinks: int) -> npt.NDArray[np.bool_]:
    """``[num_texts, num_tokens]``: which tokens of pieces of the book are separators or sinks."""
    ids = book_ids()
    pieces = [np.roll(ids, -997 * i) for i in range(num_texts)]
    longer = [np.tile(piece, 1 + num_tokens // len(ids))[:num_tokens] for piece in pieces]
    flags = np.stack([policy().kept_flags(piece) for piece in longer])
    flags[:, :num_sinks] = True
    return flags


def print_shares() -> None:
    """What ``kernels/README.md`` says must move and be computed, of the book alone."""
    for context in (4096, 16384, 32768, 131072):
        flags = kept_flags(64, context, num_sinks=4)
        prefix = np.concatenate([np.zeros((64, 1), dtype=np.int64), flags.cumsum(1)], axis=1)
        positions = np.arange(context)
        behind = np.maximum(positions - WINDOW + 1, 0)  # the window
        seen = prefix[:, behind] + positions + 1 - behind
        entries, pairs = seen[:, -1].mean(), int(seen[0].sum())
        print(
            f"{context:7,} tokens: the last sees {entries:,.0f} ({entries / context:.1%}); "
            f"a prompt computes {pairs / 1e6:,.1f} million pairs "
            f"({pairs / (context * (context + 1) / 2):.1%})"
        )


if __name__ == "__main__":
    print_shares()
