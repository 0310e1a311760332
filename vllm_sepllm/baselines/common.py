"""What the baselines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

# Arguments with which models of Transformers ask for more than plain attention.
_OTHERS = "softcap", "sliding_window", "s_aux", "dropout"


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


def attention_layers(model: Any) -> list[Any]:
    """Those whose attention Transformers can replace, in their order."""
    return [x for x in model.modules() if hasattr(x, "layer_idx") and hasattr(x, "scaling")]


# State of a layer, its index, queries, keys and values ``[batch, heads, tokens, size]``, and what
# logits are multiplied by; to ``[batch, tokens, heads, size]``.
Attend = Callable[
    [Any, int, torch.Tensor, torch.Tensor, torch.Tensor, float],
    torch.Tensor,
]


def install(model: Any, name: str, attend: Attend, states: Sequence[Any]) -> None:
    """Have a model's layers compute attention with a function, each with its state.

    Args:
        model: changed.
        name: in ``AttentionInterface``.
        attend: computes attention over the keys of all tokens so far. No mask is made.
        states: one for each of :func:`attention_layers`.

    Raises:
        ValueError: a layer asks for more than plain attention.
    """
    place = f"_{name.replace('-', '_')}"
    text = model.config.get_text_config(decoder=True)
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
        raise ValueError(
            f"the model has layers of the types {', '.join(sorted({*text.layer_types}))}: this "
            "baseline has plain causal attention only"
        )

    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        refuse_others({**more, "dropout": dropout or None})
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        state = getattr(module, place)
        return attend(state, module.layer_idx, query, key, value, scaling), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, _no_mask)
    model.set_attn_implementation(name)
    for layer, state in zip(attention_layers(model), states, strict=True):
        setattr(layer, place, state)


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **more: Any) -> None:
    """In the place of a mask.

    Raises:
        ValueError: a text is padded.
    """
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            "attention_mask has zeros: this baseline would attend to padding; give it one text at "
            "a time, or texts of one length"
        )


def num_kv_heads(model: Any) -> int:
    """Of each layer."""
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
