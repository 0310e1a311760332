"""What tests of training share: small models of four architectures, and what they must compute."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

VOCABULARY = 96
SEPARATORS = (3, 4, 5)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES = ("Llama", "Qwen3", "Mistral", "GPTNeoX")


def make_model(architecture: str = "Llama", **options: Any) -> Any:
    """A model with random weights, the same at each call, in float64."""
    import transformers

    sizes = dict(SIZES)
    if architecture != "GPTNeoX":
        sizes["num_key_value_heads"] = 2
    if architecture == "Mistral":
        sizes["sliding_window"] = None
    if architecture == "Qwen3":
        sizes["head_dim"] = 16
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is not next to uniform
            parameter.mul_(3 if parameter.dim() == 2 else 1)
    return model


def make_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random texts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, length).tolist() for length in lengths]


def bias_of(mask: torch.Tensor) -> torch.Tensor:
    """A mask as models take it: ``[1, 1, queries, keys]``."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)[None, None]
