"""PoD, distant keys shared between layers: :func:`apply_pod`.

Ma et al. (arXiv 2412.02252); its code was not published, so this is our reading of the paper:

1. Consecutive layers whose heads attend alike form blocks (:func:`make_blocks`). How alike two
   heads are is 1 less the Jensen-Shannon divergence (base 2) of what the last queries of some texts
   attend to. A layer joins a block if it is alike to all layers in it.
2. Near tokens, the first few and the most recent ones, are attended with a layer's own keys.
   Distant ones are attended with the keys of the block's first layer, and the layer's own values.
   One softmax goes over both.
3. The model is then trained a little under this (``examples/training/adapt_pod.py``).

Blocks are found for each KV head, since a cache holds keys by KV head. Keys of a distant token are
then held once for a block: with blocks of ``n`` layers that saves ``(1 - 1/n) / 2`` of its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_sepllm.baselines.common import attention_layers, install, num_kv_heads

NAME = "sepllm-pod"
Blocks = tuple[tuple[int, ...], ...]  # by layer and KV head: the layer whose distant keys are taken


@dataclass
class SharedKeys:
    """What the layers of a model have in common during one forward pass.

    Attributes:
        blocks: ``[layers][kv_heads]``, the first layer of each one's block.
        num_sink_tokens: first tokens, always near.
        recent: most recent tokens that are near, the query's own included.
        probabilities: of each layer's last queries, ``[heads, queries, keys]``, if asked for.
    """

    blocks: Blocks
    num_sink_tokens: int
    recent: int
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    num_observed: int = 0
    probabilities: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def saved(self) -> float:
        """Share of a distant token's KV cache that is not held."""
        shared = [at != layer for layer, heads in enumerate(self.blocks) for at in heads]
        return sum(shared) / len(shared) / 2

    def distant_keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor | None:
        """``[batch, kv_heads, tokens, size]``; ``None`` where they are the layer's own."""
        if layer == 0:
            self.keys.clear()
        self.keys[layer] = keys
        heads = self.blocks[layer]
        if all(at == layer for at in heads):
            return None
        return torch.stack([self.keys[at][:, head] for head, at in enumerate(heads)], 1)


def _attend(
    state: SharedKeys,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """See :data:`vllm_sepllm.baselines.common.Attend`."""
    groups, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    places = torch.arange(key.shape[2], device=query.device)
    back = places[-num_queries:, None] - places
    logits = torch.matmul(query, key.repeat_interleave(groups, 1).mT) * scaling
    distant = state.distant_keys(layer, key)
    if distant is not None:
        near = (places < state.num_sink_tokens) | (back < state.recent)
        others = torch.matmul(query, distant.repeat_interleave(groups, 1).mT) * scaling
        logits = torch.where(near, logits, others)
    logits = logits.masked_fill(back < 0, -torch.inf)
    wide = torch.promote_types(query.dtype, torch.float32)
    probabilities = logits.softmax(-1, dtype=wide).to(query.dtype)
    if state.num_observed:
        state.probabilities[layer] = probabilities[0, :, -state.num_observed :].detach()
    found = torch.matmul(probabilities, value.repeat_interleave(groups, 1))
    return found.transpose(1, 2)


def apply_pod(
    model: Any, blocks: Sequence[Sequence[int]], num_sink_tokens: int = 16, recent: int = 4080
) -> SharedKeys:
    """Make a Hugging Face decoder attend as PoD does. It can be trained so.

    Texts of a batch must have the same length: there is no padding. Gradient checkpointing cannot
    be used, as it computes layers again out of their order.

    Args:
        model: a causal language model of Transformers.
        blocks: ``[layers][kv_heads]``, the layer whose keys distant tokens take: an earlier one, or
            the layer itself; :func:`make_blocks` finds them.
        num_sink_tokens: first tokens, always near; 16 is the paper's setting.
        recent: most recent tokens that are near; 4,080 is the paper's.

    Returns:
        What the layers share.

    Raises:
        ValueError: the blocks are not those of such a model.
    """
    layers = attention_layers(model)
    num_heads = num_kv_heads(model)
    found = tuple(tuple(heads) for heads in blocks)
    if len(found) != len(layers) or any(len(heads) != num_heads for heads in found):
        raise ValueError(
            f"blocks of {len(found)} layers: must name a layer for each of {len(layers)} layers "
            f"and {num_heads} KV heads"
        )
    for layer, heads in enumerate(found):
        for head, at in enumerate(heads):
            if not 0 <= at <= layer or found[at][head] != at:
                raise ValueError(
                    f"blocks[{layer}][{head}]={at}: must be the layer itself or the first layer of "
                    "a block before it"
                )
    if recent < 1 or num_sink_tokens < 0:
        raise ValueError(
            f"num_sink_tokens={num_sink_tokens}, recent={recent}: must be at least 0 and 1"
        )
    state = SharedKeys(found, num_sink_tokens, recent)
    install(model, NAME, _attend, [state] * len(layers))
    return state


def own_keys(num_layers: int, num_kv_heads: int) -> Blocks:
    """Blocks of one layer each: full attention."""
    return tuple((layer,) * num_kv_heads for layer in range(num_layers))


@torch.no_grad()
def similarities(model: Any, texts: Sequence[Sequence[int]], last: int = 64) -> torch.Tensor:
    """How alike heads of any two layers attend: ``[layers, layers, kv_heads]``, from 0 to 1.

    Args:
        model: a causal language model of Transformers, which is changed to compute with PoD's code.
        texts: token ids.
        last: queries at each text's end that are looked at.
    """
    text = model.config.get_text_config(decoder=True)
    num_layers = text.num_hidden_layers
    num_heads = num_kv_heads(model)
    state = apply_pod(model, own_keys(num_layers, num_heads))
    state.num_observed = last
    total = torch.zeros(num_layers, num_layers, num_heads)
    for ids in texts:
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
        rows = torch.stack([state.probabilities[layer] for layer in range(num_layers)]).float()
        for layer in range(num_layers):
            alike = 1 - _divergence(rows[layer], rows).mean(-1)  # [layers, heads]
            total[layer] += alike.view(num_layers, num_heads, -1).mean(-1).cpu()
    state.num_observed = 0
    state.probabilities.clear()
    return total / len(texts)


def _divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon, base 2, over the last dimension."""
    middle = ((first + second) / 2).clamp_min(1e-12).log2()
    parts = [x * (x.clamp_min(1e-12).log2() - middle) for x in (first, second)]
    return (parts[0] + parts[1]).sum(-1) / 2


def make_blocks(alike: torch.Tensor, least: float = 0.5) -> Blocks:
    """Blocks of consecutive layers, for each KV head on its own, from the first layer on.

    Args:
        alike: ``[layers, layers, kv_heads]`` of :func:`similarities`.
        least: a layer joins a block if it is at least so alike to all its layers; 0.5 is the
            paper's setting.
    """
    num_layers, _, num_heads = alike.shape
    by_head = []
    for head in range(num_heads):
        first, found = 0, []
        for layer in range(num_layers):
            if any(alike[at, layer, head] < least for at in range(first, layer)):
                first = layer
            found.append(first)
        by_head.append(found)
    return tuple(zip(*by_head, strict=True))
