"""One forward pass of a model: what its tokens see, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sepllm_kernels.sequence.packed import PackedPlan
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vllm_sepllm.layers import Layer, LayerPlan
from vllm_sepllm.spans import BoolArray
from vllm_sepllm.training.plan import Pattern, TextPlan, Texts, pack

KEYWORD = "sepllm_step"  # by which layers get it


class IdLayer(DynamicLayer):  # type: ignore[misc]
    """Token ids in a cache of keys and values, as one more layer behind the model's.

    What is cut off, repeated or reordered in the cache is so for the ids too. Keys are ids, values
    positions; both are ``[rows, 1, tokens, 1]`` int64.
    """

    @staticmethod
    def of(cache: Cache, num_layers: int) -> IdLayer:
        """The one of a cache; it is put in if there is none.

        Raises:
            ValueError: the cache has tokens whose ids are not known, or a fixed length.
        """
        known = [layer for layer in cache.layers if isinstance(layer, IdLayer)]
        length = known[0].get_seq_length() if known else 0
        if cache.get_seq_length() != length:
            raise ValueError(
                f"of the cache's {cache.get_seq_length()} tokens the ids of {length} are known: it "
                "was filled without SepLLM or by a model in training, or gradient checkpointing "
                "keeps nothing in it; start with an empty one, and call model.eval() before you "
                "generate"
            )
        if known:
            return known[0]
        if getattr(cache, "offloading", False):
            raise ValueError(
                "the cache is moved off the device layer by layer, which SepLLM cannot be used "
                'with: leave out cache_implementation="offloaded"'
            )
        if cache.is_compileable:
            raise ValueError(
                f"{type(cache).__name__} has a fixed length, which SepLLM cannot be used with: "
                "leave out cache_implementation"
            )
        while cache.layer_class_to_replicate is not None and len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        found = IdLayer()
        cache.layers.append(found)
        return found

    def extend(
        self, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; all ids and positions, ``[rows, tokens]`` each."""
        ids, places = self.update(input_ids[:, None, :, None], positions[:, None, :, None])
        return ids[:, 0, :, 0], places[:, 0, :, 0]


class Step:
    """What the tokens of one forward pass see.

    It is no dataclass: FSDP makes new ones of those that it hands to a layer, and every layer would
    work everything out again.

    Attributes:
        pattern: what the kept layers see.
        layers: which are dense.
        texts: of all tokens, those of the cache included.
        num_queries: tokens of a row that this pass computes; the others are in the cache.
        found: what was worked out so far. It fills up.
    """

    def __init__(self, pattern: Pattern, layers: LayerPlan, texts: Texts, num_queries: int) -> None:
        self.pattern = pattern
        self.layers = layers
        self.texts = texts
        self.num_queries = num_queries
        self.found: dict[Any, Any] = {}

    @staticmethod
    def of(pattern: Pattern, layers: LayerPlan, num_layers: int, inputs: Mapping[str, Any]) -> Step:
        """Of a decoder's arguments.

        Args:
            pattern: what the kept layers see.
            layers: which are dense.
            num_layers: of the model.
            inputs: the decoder's arguments by name: ``input_ids`` ``[rows, tokens]``, and where
                they are there ``position_ids``, ``attention_mask`` (of the cached tokens too) and
                ``past_key_values``.

        Raises:
            ValueError: one of them has another shape, or cannot be used.
        """
        ids, cache = inputs["input_ids"], inputs.get("past_key_values")
        num_queries = ids.shape[1]
        done = 0 if cache is None else cache.get_seq_length()
        positions = _positions(inputs, ids, done)
        is_token = _is_token(inputs.get("attention_mask"), (ids.shape[0], done + num_queries))
        if cache is not None:
            ids, positions = IdLayer.of(cache, num_layers).extend(ids, positions)
        return Step(pattern, layers, Texts.of(ids, is_token, positions, done), num_queries)

    @property
    def is_whole(self) -> bool:
        """Whether no token is in the cache."""
        return bool(self.num_queries == self.texts.is_token.shape[1])

    @property
    def is_used(self) -> bool:
        """Whether a layer has asked what it sees."""
        return bool(self.found)

    def rows(self, device: torch.device) -> torch.Tensor | None:
        """Places of all tokens but padding in a batch ``[rows * tokens]``; ``None`` if there is no
        padding."""
        if not self.texts.has_padding:
            return None
        if ("rows", device) not in self.found:
            places = torch.from_numpy(np.flatnonzero(self.texts.is_token))
            self.found["rows", device] = places.to(device)
        rows: torch.Tensor = self.found["rows", device]
        return rows

    def kind(self, layer: int, sliding_window: int | None) -> Layer | int:
        """What a layer does: a layer with a window of its own keeps it."""
        kind = self.layers[layer] if sliding_window is None else sliding_window
        self.found.setdefault("kinds", set()).add(kind)
        return kind

    def heads(self, kind: Layer | int, num_kv_heads: int) -> tuple[slice, ...]:
        """KV heads of a kind of layer that see alike."""
        return self.pattern.heads(num_kv_heads) if kind == Layer.KEPT else (slice(num_kv_heads),)

    def plans(self, kind: Layer | int, device: torch.device | str = "cpu") -> list[PackedPlan]:
        """From a kind of layer, the plans of a whole batch for :meth:`heads`."""
        key = "plans", kind, device
        if key not in self.found:
            by_heads = zip(*self._text_plans(kind), strict=True)
            self.found[key] = [pack(texts, device) for texts in by_heads]
        plans: list[PackedPlan] = self.found[key]
        return plans

    def _text_plans(self, kind: Layer | int) -> list[tuple[TextPlan, ...]]:
        """By text."""
        if kind == Layer.KEPT:
            return [self.pattern.text_plans(ids) for ids in self.texts.token_ids]
        window = kind if isinstance(kind, int) else None
        return [(TextPlan.causal(ids.size, window),) for ids in self.texts.token_ids]

    def mask(self, kind: Layer | int, device: torch.device) -> torch.Tensor:
        """From a kind of layer, what the queries see of all tokens: ``[rows, 1, num_queries, all
        tokens]`` bool. Padding sees itself."""
        key = "mask", kind, device
        if key not in self.found:
            self.found[key] = self._mask(kind).to(device)
        mask: torch.Tensor = self.found[key]
        return mask

    def _mask(self, kind: Layer | int) -> torch.Tensor:
        plans = self.plans(kind)
        if len(plans) > 1:
            raise ValueError(
                "heads that see different tokens are for training: take them out with remove() "
                "before you generate"
            )
        [plan], is_token = plans, self.texts.is_token
        num_rows, num_tokens = is_token.shape
        mask = torch.zeros(num_rows, self.num_queries, num_tokens, dtype=torch.bool)
        queries = torch.arange(self.num_queries)
        mask[:, queries, queries + num_tokens - self.num_queries] = True
        behind = np.cumsum([0, *is_token.sum(1)])
        for row, flags in enumerate(is_token):
            at = torch.from_numpy(np.flatnonzero(flags))
            is_query = at >= num_tokens - self.num_queries
            places = torch.arange(int(behind[row]), int(behind[row + 1]))
            seen = plan.mask_of(places[is_query])[:, places]
            mask[row, (at[is_query] - num_tokens + self.num_queries)[:, None], at] = seen
        return mask[:, None]


def cache_for(decoder: Any, inputs: Mapping[str, Any]) -> Cache | None:
    """The cache that a decoder uses; where it would make one, it is made here, to know its ids."""
    given: Cache | None = inputs.get("past_key_values")
    used = inputs.get("use_cache")
    if given is not None or not (decoder.config.use_cache if used is None else used):
        return given
    return None if decoder.training else DynamicCache(config=decoder.config)


def _is_token(mask: torch.Tensor | None, shape: tuple[int, int]) -> BoolArray | None:
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask is {list(mask.shape)}: it must be {list(shape)}, 0 for padding and 1 "
            "for tokens, those in the cache too; what else a token sees is decided by the rule"
        )
    flags: BoolArray = mask.cpu().numpy() != 0
    return flags


def _positions(inputs: Mapping[str, Any], input_ids: torch.Tensor, done: int) -> torch.Tensor:
    """Of each token, ``[rows, tokens]`` int64."""
    given: torch.Tensor | None = inputs.get("position_ids")
    if given is None:
        if inputs.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "cu_seq_lens_q without position_ids: SepLLM tells packed texts apart by their "
                "positions; have the data collator return position_ids"
            )
        places = torch.arange(done, done + input_ids.shape[1], device=input_ids.device)
        return places.expand_as(input_ids)
    rows, num_tokens = input_ids.shape
    if given.dim() != 2 or given.shape[0] not in (1, rows) or given.shape[1] != num_tokens:
        raise ValueError(
            f"position_ids are {list(given.shape)}: they must be {list(input_ids.shape)}, one for "
            "each token"
        )
    return given.to(input_ids.device, torch.int64).expand_as(input_ids)
