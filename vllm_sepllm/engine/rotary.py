"""Rotary embeddings of a model whose queries number what they see from 0
(``position_mode="cache"``).

Keys and queries leave the model turned to their positions in the text. Stream keys, and the
queries that meet them, are turned back from there (``policy`` says how far), so all that is needed
of a model are the frequencies of its rotary embeddings. Angles are multiplied out in float64 for
the tokens of a step: no table grows with the length of texts, and at position 8,388,607 an angle
is as exact as at position 1. (In float32, which vLLM's tables are made in, it is off by up to a
quarter of a radian there.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding import (
    Llama3RotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import (
    LinearScalingRotaryEmbedding,
)

from vllm_sepllm.config import ConfigError

REMEDY = "use position_mode='original'"
_PROBED_POSITIONS = (0, 1, 100)


@dataclass(frozen=True, eq=False)
class Rotation:
    """How rotary embeddings turn a vector (RoFormer, arXiv 2104.09864, equation 34).

    Attributes:
        inv_freq: ``[rotary_dim / 2]`` float64, radians per position.
        is_neox: pairs are ``(i, i + rotary_dim / 2)``; otherwise ``(2 i, 2 i + 1)``.
        scale: the model's own factor on turned vectors (YaRN, arXiv 2309.00071, section 3.4).
    """

    inv_freq: torch.Tensor
    is_neox: bool
    scale: float = 1.0

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines, of the angles that ``[num_rows]`` positions stand for; they may be
        negative. ``[num_rows, rotary_dim]`` float32."""
        angles = positions.to(torch.float64)[:, None] * self.inv_freq
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(torch.float32)

    def turn(
        self, vectors: torch.Tensor, rows: torch.Tensor, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Turn vectors, in float32.

        Args:
            vectors: ``[num_vectors, num_heads, head_size]``.
            rows: of :meth:`rows`.
            index: ``[num_vectors]`` int64, row of each vector; ``None`` is one for each.

        Returns:
            A copy, of the same shape and dtype.
        """
        if index is None:
            index = torch.arange(len(vectors), device=vectors.device)
        turned = vectors.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        size = vectors.shape[-1]
        ops.rotary_embedding(index, turned.flatten(1), None, size, rows, self.is_neox)
        return turned.to(vectors.dtype)


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
        """Turn queries and keys to their positions, in place where vLLM's kernel does.

        Args:
            positions: ``[num_tokens]`` int64.
            query, key: ``[num_tokens, num_heads * head_size]``.
        """
        positions = positions.flatten()
        rows = (self._rotation.rows(positions) * self._rotation.scale).to(query.dtype)
        index = torch.arange(len(positions), device=positions.device)
        options = self.head_size, rows, self.is_neox_style
        if self._is_native:
            head_size, *rest = options
            result: tuple[torch.Tensor, torch.Tensor | None] = RotaryEmbedding.forward_static(
                index, query, key, head_size, self.rotary_dim, *rest
            )
            return result
        ops.rotary_embedding(index, query, key, *options)
        return query, key


def rotation_of(embedding: RotaryEmbeddingBase) -> Rotation:
    """What one of vLLM's rotary embeddings does.

    Raises:
        ConfigError: it is of a kind whose frequencies depend on more than a vector's position.
    """
    scale = 1.0
    kind: Any = embedding
    if type(embedding) in (RotaryEmbedding, Llama3RotaryEmbedding):
        inv_freq = kind._compute_inv_freq(kind.base)
    elif type(embedding) is LinearScalingRotaryEmbedding and len(kind.scaling_factors) == 1:
        inv_freq = kind._compute_inv_freq(kind.base) / kind.scaling_factors[0]
    elif type(embedding) is YaRNScalingRotaryEmbedding:
        inv_freq = kind._compute_inv_freq(kind.scaling_factor)
        scale = kind.mscale
    else:
        raise ConfigError(
            f"position_mode='cache' does not know the rotary embedding {type(embedding).__name__}, "
            f"only plain, linear, llama3 and yarn ones: {REMEDY}"
        )
    device = kind.cos_sin_cache.device
    return Rotation(inv_freq.to(device, torch.float64), embedding.is_neox_style, scale)


def prepare_cache_positions(model: nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
    """Give a model's attention layers rotary embeddings without end, and those of SepLLM attention
    their ``rotation``.

    Each layer is asked how it turns its keys, with one vector at a few positions: some models have
    rotary embeddings and leave them out in some layers, or change keys once they are turned.

    Args:
        model: with its weights; changed.
        hidden_size: elements that attention modules take.
        dtype: of the model.

    Raises:
        ConfigError: a layer turns its keys in a way that is not known, or none does.
    """
    found: dict[int, tuple[LongRotaryEmbedding, Rotation]] = {}
    rotations = []
    for parent, name, layer in _attention_layers(model):
        embedding = _rotary_embedding(parent, layer)
        rotation = None
        if embedding is not None:
            if id(embedding) not in found:
                rotation = rotation_of(embedding)
                found[id(embedding)] = LongRotaryEmbedding(embedding, rotation), rotation
            long, rotation = found[id(embedding)]
            hidden = torch.randn(hidden_size, generator=torch.Generator().manual_seed(0))
            hidden = hidden.to(rotation.inv_freq.device, dtype)
            if not _turns_keys(parent, name, layer, rotation, hidden):
                rotation = None
            _replace(parent, embedding, long)
        rotations.append(rotation)
        layer.impl.rotation = rotation  # read by SepLLM attention only
    if not rotations:
        raise ConfigError(
            f"position_mode='cache' cannot see the attention modules of {type(model).__name__}, "
            f"which runs through Transformers: {REMEDY}"
        )
    if not any(rotations):
        raise ConfigError(
            "position_mode='cache' turns keys to other positions, and this model has no rotary "
            f"embeddings: {REMEDY}"
        )


def _attention_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Attention]]:
    """Attention layers, each with the module that holds it and its name there."""
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            parent, _, name = path.rpartition(".")
            yield model.get_submodule(parent), name, module


def _rotary_embedding(parent: nn.Module, layer: Attention) -> RotaryEmbeddingBase | None:
    """The one beside an attention layer, if any.

    Raises:
        ConfigError: there are several.
    """
    found = {id(m): m for m in parent.modules() if isinstance(m, RotaryEmbeddingBase)}
    if len(found) > 1:
        raise ConfigError(
            f"position_mode='cache' finds {len(found)} rotary embeddings beside "
            f"{layer.layer_name} and needs to know the one: {REMEDY}"
        )
    return next(iter(found.values()), None)


def _replace(parent: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in parent.modules():
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)


class _Recorder(nn.Module):
    """Takes an attention layer's place and keeps the keys it is given."""

    key: torch.Tensor | None = None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
    ) -> torch.Tensor:
        self.key = key
        return torch.zeros_like(query)


def _turns_keys(
    parent: nn.Module, name: str, layer: Attention, rotation: Rotation, hidden: torch.Tensor
) -> bool:
    """Whether an attention module turns its keys as ``rotation`` does, or not at all.

    Raises:
        ConfigError: neither.
    """
    positions = torch.tensor(_PROBED_POSITIONS, device=hidden.device)
    recorder = _Recorder()
    try:
        setattr(parent, name, recorder)
        with torch.inference_mode():
            _call(parent.forward, positions, hidden.expand(len(positions), -1).clone())
    except Exception as error:
        raise ConfigError(
            f"position_mode='cache' cannot see how {layer.layer_name} turns its keys "
            f"({type(error).__name__}: {error}): {REMEDY}"
        ) from error
    finally:
        setattr(parent, name, layer)
    assert recorder.key is not None
    keys = recorder.key.reshape(len(positions), -1, layer.head_size).float()
    still = keys[:1].expand_as(keys)
    turned = torch.stack([_turned(k, rotation, p) for k, p in zip(still, positions, strict=True)])
    size = float(keys.abs().max())
    # Another rotation is off by the length of vectors; this one by a few roundings in the dtype.
    near = size / 16
    if size > 0 and float((keys - turned).abs().max()) <= near:
        return True
    if size > 0 and float((keys - still).abs().max()) <= near:
        return False
    raise ConfigError(
        f"position_mode='cache' finds that {layer.layer_name} changes its keys beside turning "
        f"them by its rotary embedding: {REMEDY}"
    )


def _turned(vectors: torch.Tensor, rotation: Rotation, position: torch.Tensor) -> torch.Tensor:
    """Vectors ``[num_heads, head_size]`` of position 0 at another one."""
    rows, size = rotation.rows(position[None]), vectors.shape[-1]
    result, _ = RotaryEmbedding.forward_static(
        torch.zeros_like(position), vectors, None, size, rows.shape[1], rows, rotation.is_neox
    )
    assert isinstance(result, torch.Tensor)
    return result


def _call(forward: Callable[..., Any], positions: torch.Tensor, hidden: torch.Tensor) -> None:
    """Call an attention module, whose arguments have one of a few names."""
    known = {"positions": positions, "position_ids": positions, "hidden_states": hidden}
    names = inspect.signature(forward).parameters
    forward(**{name: value for name, value in known.items() if name in names})
