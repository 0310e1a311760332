"""Rotary embeddings of a model whose queries number what they see from 0
(``position_mode="cache"``).

Keys and queries leave the model rotated to their positions in the text. Stream keys, and the
queries that meet them, are rotated back from there (``policy`` says how far), so all that is needed
of a model are the frequencies of its rotary embeddings. Angles are multiplied out in float64 for
the tokens of a step: no table grows with the length of texts, and at position 8,388,607 an angle
is as exact as at position 1. (In float32, which vLLM's tables are made in, it is off by up to a
quarter of a radian there.)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
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
from vllm_sepllm.engine.worker.rotation import (
    LongRotaryEmbedding,
    LongTransformersEmbedding,
    Rotation,
)

REMEDY = "use position_mode='original'"
_PROBED_POSITIONS = (0, 1, 100)
_POSITIONS = ("positions", "position_ids")  # arguments of attention modules
_TURNED_BY = "position_embeddings"  # argument of attention modules of Transformers


def rotations_of(embedding: Any) -> list[Rotation]:
    """What a rotary embedding may do. Of vLLM's it is one thing; of those of Transformers the
    layers decide how elements are paired.

    Raises:
        ConfigError: it is of a kind whose frequencies depend on more than a vector's position.
    """
    scale = 1.0
    if type(embedding) in (RotaryEmbedding, Llama3RotaryEmbedding):
        inv_freq = embedding._compute_inv_freq(embedding.base)
    elif type(embedding) is LinearScalingRotaryEmbedding and len(embedding.scaling_factors) == 1:
        inv_freq = embedding._compute_inv_freq(embedding.base) / embedding.scaling_factors[0]
    elif type(embedding) is YaRNScalingRotaryEmbedding:
        inv_freq = embedding._compute_inv_freq(embedding.scaling_factor)
        scale = embedding.mscale
    elif getattr(embedding, "rope_type", None) in ("default", "linear", "llama3", "yarn"):
        inv_freq = embedding.inv_freq
        scale = embedding.attention_scaling
    else:
        raise ConfigError(
            f"position_mode='cache' does not know the rotary embedding {type(embedding).__name__}, "
            f"only plain, linear, llama3 and yarn ones: {REMEDY}"
        )
    styles = [True, False]
    device = inv_freq.device
    if isinstance(embedding, RotaryEmbeddingBase):
        styles = [embedding.is_neox_style]
        device = embedding.cos_sin_cache.device
    return [Rotation(inv_freq.to(device, torch.float64), style, scale) for style in styles]


def prepare_cache_positions(model: nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
    """Give a model rotary embeddings without end, and the layers of SepLLM attention their
    ``rotation``.

    Each layer is asked how it rotates its keys, with one vector at a few positions: some models
    have rotary embeddings and leave them out in some layers, or change keys once they are rotated.

    Args:
        model: with its weights; changed.
        hidden_size: elements that attention modules take.
        dtype: of the model.

    Raises:
        ConfigError: a layer rotates its keys in a way that is not known, or none does.
    """
    known: dict[nn.Module, list[Rotation]] = {}
    used: dict[nn.Module, Rotation] = {}
    probed: list[tuple[nn.Module, str, Attention, nn.Module]] = []
    for parent, name, layer in _attention_layers(model):
        layer.impl.rotation = None  # read by SepLLM attention only
        if not inspect.signature(parent.forward).parameters.keys() & {*_POSITIONS, _TURNED_BY}:
            continue  # it knows no positions
        embedding = _rotary_embedding(model, parent, layer)
        rotations = []
        if embedding is not None:
            rotations = known.setdefault(embedding, rotations_of(embedding))
        keys = _keys_at_positions(parent, name, layer, embedding, hidden_size, dtype)
        rotation = _rotation_of_keys(keys, rotations, layer)
        layer.impl.rotation = rotation
        if embedding is not None and rotation is not None:
            used[embedding] = rotation
            probed.append((parent, name, layer, embedding))
    if not any(layer.impl.rotation for _, _, layer in _attention_layers(model)):
        raise ConfigError(
            "position_mode='cache' rotates keys to other positions, and this model has no rotary "
            f"embeddings: {REMEDY}"
        )
    new = {}
    for embedding, rotation in used.items():
        is_vllms = isinstance(embedding, RotaryEmbeddingBase)
        long = LongRotaryEmbedding if is_vllms else LongTransformersEmbedding
        new[embedding] = long(embedding, rotation)
        _replace(model, embedding, new[embedding])
    for parent, name, layer, embedding in probed:
        # Some models read a table of theirs, which the new ones do not have.
        _keys_at_positions(parent, name, layer, new[embedding], hidden_size, dtype)


def _attention_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Attention]]:
    """Attention layers, each with the module that holds it and its name there."""
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            parent, _, name = path.rpartition(".")
            yield model.get_submodule(parent), name, module


def _rotary_embedding(model: nn.Module, parent: nn.Module, layer: Attention) -> nn.Module | None:
    """The one beside an attention layer, or the whole model's, if any.

    Raises:
        ConfigError: there are several.
    """
    found = {m for m in parent.modules() if isinstance(m, RotaryEmbeddingBase)}
    if not found and _TURNED_BY in inspect.signature(parent.forward).parameters:
        found = {m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "rope_type")}
    if len(found) > 1:
        raise ConfigError(
            f"position_mode='cache' finds {len(found)} rotary embeddings for {layer.layer_name} "
            f"and needs to know the one: {REMEDY}"
        )
    return next(iter(found), None)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
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


def _keys_at_positions(
    parent: nn.Module,
    name: str,
    layer: Attention,
    embedding: nn.Module | None,
    hidden_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Keys that an attention module makes of one vector at a few positions, the first being 0.
    ``[num_positions, num_kv_heads, head_size]`` float32.

    Raises:
        ConfigError: it cannot be called.
    """
    device = next(parent.parameters()).device
    positions = torch.tensor(_PROBED_POSITIONS, device=device)
    hidden = torch.randn(hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device, dtype).expand(len(positions), -1).clone()
    known: dict[str, Any] = {"hidden_states": hidden, **dict.fromkeys(_POSITIONS, positions)}
    recorder = _Recorder()
    # Layers with adapters only compute within a step; without them they rotate keys all the same.
    wrapped = {n: m for n, m in parent.named_children() if isinstance(m, BaseLayerWithLoRA)}
    try:
        names = inspect.signature(parent.forward).parameters
        setattr(parent, name, recorder)
        for child, module in wrapped.items():
            setattr(parent, child, module.base_layer)
        with torch.inference_mode():
            if _TURNED_BY in names:  # a batch of one, as Transformers has it
                assert embedding is not None, "what gives cosines and sines was not found"
                known = {name: tensor[None] for name, tensor in known.items()}
                known[_TURNED_BY] = embedding(known["hidden_states"], known["position_ids"])
                known["attention_mask"] = None
            parent.forward(**{name: value for name, value in known.items() if name in names})
            assert recorder.key is not None
            return recorder.key.reshape(len(positions), -1, layer.head_size).float()
    except Exception as error:
        raise ConfigError(
            f"position_mode='cache' cannot see how {layer.layer_name} rotates its keys "
            f"({type(error).__name__}: {error}): {REMEDY}"
        ) from error
    finally:
        setattr(parent, name, layer)
        for child, module in wrapped.items():
            setattr(parent, child, module)


def _rotation_of_keys(
    keys: torch.Tensor, rotations: list[Rotation], layer: Attention
) -> Rotation | None:
    """The one that rotated ``[num_positions, num_kv_heads, head_size]``; ``None``: nothing did.

    Raises:
        ConfigError: something else did.
    """
    positions = torch.tensor(_PROBED_POSITIONS, device=keys.device)
    still = keys[:1].expand_as(keys)
    # Another rotation is off by the length of vectors; this one by a few roundings in the dtype.
    near = float(keys.abs().max()) / 16
    if near > 0:
        for rotation in rotations:
            cos_sin, size = rotation.cos_sin(positions), keys.shape[-1]
            index = torch.arange(len(positions), device=keys.device)
            rotated, _ = RotaryEmbedding.forward_static(
                index, still.flatten(1), None, size, cos_sin.shape[1], cos_sin, rotation.is_neox
            )
            if float((keys - rotated.view_as(keys)).abs().max()) <= near:
                return rotation
        if float((keys - still).abs().max()) <= near:
            return None
    raise ConfigError(
        f"position_mode='cache' finds that {layer.layer_name} does more to its keys, or another "
        f"thing, than rotating them by a plain, linear, llama3 or yarn rotary embedding: {REMEDY}"
    )
