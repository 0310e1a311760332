"""Floating-point operations of training, counted from what a model's tokens see.

A product of matrices counts two operations for each pair of elements that meet, as usual; norms,
activations and the softmax are left out. A backward pass counts twice its forward pass, so all is
counted three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

PASSES = 3  # forward, and twice as much backward


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides the count.

    Attributes:
        num_layers: with attention.
        weights: elements of all matrices that every token is multiplied with, but the LM head's.
        head_weights: of the LM head.
        attention_size: heads of the query times head size.
    """

    num_layers: int
    weights: int
    head_weights: int
    attention_size: int

    @staticmethod
    def of(model: Any) -> ModelSize:
        """Of a causal language model of transformers."""
        text = model.config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        products = torch.nn.Linear, Conv1D  # the latter is GPT-2's
        linear = [m for m in model.get_decoder().modules() if isinstance(m, products)]
        head = model.get_output_embeddings()
        weights = sum(m.weight.numel() for m in linear)
        return ModelSize(text.num_hidden_layers, weights, head.weight.numel(), heads * size)

    def operations(self, num_tokens: int, num_pairs: int, with_head: bool = True) -> int:
        """Of one training step.

        Args:
            num_tokens: of the step.
            num_pairs: of a query and a key that it sees, in one layer.
            with_head: the LM head too; the SepLLM paper leaves it out.
        """
        weights = self.weights + (self.head_weights if with_head else 0)
        attention = 4 * self.attention_size * self.num_layers * num_pairs
        return PASSES * (2 * weights * num_tokens + attention)


def causal_pairs(num_tokens: int) -> int:
    """Pairs of causal attention over one text: what a good dense kernel computes."""
    return num_tokens * (num_tokens + 1) // 2


def shares(size: ModelSize, num_tokens: int, num_pairs: int) -> dict[str, float]:
    """A step's operations over those of full attention.

    Returns:
        ``"causal"``: against causal attention, with the LM head. ``"as in the paper"``: against the
        whole square of queries and keys, without the LM head (arXiv 2412.12094, table 3).
        ``"attention"``: attention alone, against causal.
    """
    causal = causal_pairs(num_tokens)
    return {
        "causal": size.operations(num_tokens, num_pairs) / size.operations(num_tokens, causal),
        "as in the paper": size.operations(num_tokens, num_pairs, with_head=False)
        / size.operations(num_tokens, num_tokens**2, with_head=False),
        "attention": num_pairs / causal,
    }
