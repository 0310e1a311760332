"""What the baselines share."""

from __future__ import annotations

from typing import Any

# Arguments with which models of Transformers ask for more than plain attention.
_OTHERS = "softcap", "sliding_window", "s_aux"


def refuse_others(given: dict[str, Any]) -> None:
    """Refuse what a baseline would leave out silently.

    Raises:
        ValueError: a layer asks for more than plain attention.
    """
    for name in _OTHERS:
        if given.get(name) is not None:
            raise ValueError(
                f"the model's attention has {name}={given[name]!r}: this baseline has plain causal "
                "attention only"
            )


def num_kv_heads(model: Any) -> int:
    """Of each layer."""
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
