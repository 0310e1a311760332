"""How many bytes of KV cache a token takes in a model, read from its folder without network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Keys of a config.json under which a layer's cache is something else than keys and values of all
# its tokens, so the formula below would be wrong.
_OTHER_CACHES = ("kv_lora_rank", "sliding_window", "attention_chunk_size")
_OTHER_HEADS = ("num_kv_heads", "multi_query")  # Falcon's words for what the formula reads


@dataclass(frozen=True)
class KVShape:
    """What one token leaves in the KV cache.

    Attributes:
        num_layers: layers of the model.
        num_kv_heads: of each layer.
        head_dim: numbers of a head's key, and of its value.
        element_bytes: of a number, in the model's own dtype.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int


def kv_bytes(shape: KVShape, num_tokens: int, num_layers: int | None = None) -> int:
    """Bytes of keys and values of so many tokens.

    Args:
        shape: of the model.
        num_tokens: tokens, or pages times the tokens of a page.
        num_layers: layers that hold them; ``None`` is all.
    """
    layers = shape.num_layers if num_layers is None else num_layers
    return 2 * layers * shape.num_kv_heads * shape.head_dim * shape.element_bytes * num_tokens


def read_shape(model: str) -> KVShape | None:
    """The shape that a model folder's ``config.json`` says; ``None`` where it does not."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return shape_of(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None


def shape_of(config: Mapping[str, Any]) -> KVShape | None:
    """The same from what the file holds.

    Raises:
        KeyError, TypeError, ValueError: a number is missing, or is none.
    """
    text = config.get("text_config") or config
    switched_off = {"sliding_window"} if text.get("use_sliding_window") is False else set()
    if any(text.get(key) for key in set(_OTHER_CACHES) - switched_off):
        return None
    if set(text.get("layer_types") or ()) - {"full_attention"}:
        return None
    if "num_key_value_heads" not in text and any(key in text for key in _OTHER_HEADS):
        return None
    names = (each.get(key) for each in (text, config) for key in ("dtype", "torch_dtype"))
    dtype = next((str(name).removeprefix("torch.") for name in names if name), "")
    heads = int(text["num_attention_heads"])
    shape = KVShape(
        num_layers=int(text["num_hidden_layers"]),
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
        element_bytes=_ELEMENT_BYTES[dtype],
    )
    return shape if min(vars(shape).values()) > 0 else None
