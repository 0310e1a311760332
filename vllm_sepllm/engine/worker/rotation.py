"""How rotary embeddings rotate a vector, and embeddings that do it at positions without end.

Angles are multiplied out in float64 for the tokens of a step: no table grows with the length of
texts, and at position 8,388,607 an angle is as exact as at position 1. (In float32, which vLLM's
tables are made in, it is off by up to a quarter of a radian there.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding


@dataclass(frozen=True, eq=False)
class Rotation:
    """How rotary embeddings rotate a vector (RoFormer, arXiv 2104.09864, equation 34).

    Attributes:
        inv_freq: ``[rotary_dim / 2]`` float64, radians per position.
        is_neox: pairs are ``(i, i + rotary_dim / 2)``; otherwise ``(2 i, 2 i + 1)``.
        scale: the model's own factor on rotated vectors (YaRN, arXiv 2309.00071, section 3.4).
    """

    inv_freq: torch.Tensor
    is_neox: bool
    scale: float = 1.0

    def cos_sin(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines, of the angles of positions, ``[num_positions, rotary_dim]`` float32.

        Positions, ``[num_positions]``, may be negative.
        """
        angles = positions.to(torch.float64)[:, None] * self.inv_freq
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(torch.float32)

    def rotate(
        self, vectors: torch.Tensor, cos_sin: torch.Tensor, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotate vectors, in float32.

        Args:
            vectors: ``[num_vectors, num_heads, head_size]``.
            cos_sin: of :meth:`cos_sin`.
            index: ``[num_vectors]`` int64, which of them is for each; ``None``: one for each.

        Returns:
            A copy, of the same shape and dtype.
        """
        if index is None:
            index = torch.arange(len(vectors), device=vectors.device)
        rotated = vectors.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        size = vectors.shape[-1]
        ops.rotary_embedding(index, rotated.flatten(1), None, size, cos_sin, self.is_neox)
        return rotated.to(vectors.dtype)


class LongRotaryEmbedding(nn.Module):
    """A model's rotary embedding without its table, so that positions have no end.

    Args:
        original: one of vLLM's; it is left as it is, since models of a process share it.
        rotation: what it does.
    """

    def __init__(self, original: RotaryEmbedding, rotation: Rotation) -> None:
        super().__init__()
        self.head_size = original.head_size
        self.rotary_dim = original.rotary_dim
        self.is_neox_style = original.is_neox_style
        self._rotation = rotation
        # vLLM decides by platform and configuration whether its own kernel is used.
        self._is_native = original._forward_method == original.forward_native

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate queries and keys to their positions, in place where vLLM's kernel does.

        Args:
            positions: ``[num_tokens]`` int64.
            query, key: ``[num_tokens, num_heads * head_size]``.
        """
        positions = positions.flatten()
        cos_sin = (self._rotation.cos_sin(positions) * self._rotation.scale).to(query.dtype)
        index = torch.arange(len(positions), device=positions.device)
        options = self.head_size, cos_sin, self.is_neox_style
        if self._is_native:
            head_size, *rest = options
            result: tuple[torch.Tensor, torch.Tensor | None] = RotaryEmbedding.forward_static(
                index, query, key, head_size, self.rotary_dim, *rest
            )
            return result
        ops.rotary_embedding(index, query, key, *options)
        return query, key


class LongTransformersEmbedding(nn.Module):
    """The same for a model that runs through Transformers, where one module gives cosines and sines
    to all layers.

    Args:
        original: of Transformers.
        rotation: what it does.
    """

    def __init__(self, original: Any, rotation: Rotation) -> None:
        super().__init__()
        self._rotation = rotation
        # Each angle comes twice: all after all, or one beside the other.
        one = torch.ones(1, 1, dtype=torch.int64, device=rotation.inv_freq.device)
        cos = original(one.float(), one)[0].flatten()
        half = len(rotation.inv_freq)
        self._are_halves = torch.equal(cos[:half], cos[half:])

    def forward(
        self, hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions.

        Args:
            hidden: gives the dtype.
            position_ids: ``[batch, num_tokens]`` int64.

        Returns:
            Each ``[batch, num_tokens, rotary_dim]``.
        """
        cos_sin = self._rotation.cos_sin(position_ids.flatten()) * self._rotation.scale
        parts = cos_sin.to(hidden.dtype).chunk(2, dim=-1)
        if self._are_halves:
            cos, sin = (torch.cat([part, part], dim=-1) for part in parts)
        else:
            cos, sin = (part.repeat_interleave(2, dim=-1) for part in parts)
        shape = (*position_ids.shape, -1)
        return cos.view(shape), sin.view(shape)
