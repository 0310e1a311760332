"""What a layer computes, under the name that transformers calls it by."""

from __future__ import annotations

from typing import Any

import torch
from sepllm_kernels.sequence.packed import packed_attention
from transformers import AttentionInterface, AttentionMaskInterface

from vllm_sepllm.layers import Layer
from vllm_sepllm.training.step import KEYWORD, Step

ATTENTION = "sepllm"


def register() -> None:
    """Tell transformers what stands for the name. Doing it twice does no harm."""
    AttentionInterface.register(ATTENTION, sepllm_attention)
    # No mask is made: what is seen follows from the token ids.
    AttentionMaskInterface.register(ATTENTION, no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """In the place of a mask."""
    return None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # plans are made in numpy
def sepllm_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the layer's attention; ``layer_idx`` says which layer it is.
        query: ``[rows, num_heads, num_queries, head_size]``.
        key, value: ``[rows, num_kv_heads, num_tokens, head_size]``, cached ones included.
        attention_mask: not used.
        scaling: factor on the logits; ``None`` is ``head_size ** -0.5``.
        dropout: must be 0.
        sliding_window: tokens, where the layer has a window of its own.
        kwargs: the :class:`Step` among them.

    Returns:
        ``[rows, num_queries, num_heads, head_size]``, and nothing in the place of weights.

    Raises:
        ValueError: the layer wants something that is not computed here.
    """
    step = kwargs.get(KEYWORD)
    _check(module, step, dropout, attention_mask, kwargs)
    assert isinstance(step, Step)
    query, key, value = _of_one_type(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = step.kind(module.layer_idx, sliding_window or _own_window(module))
    if not step.is_whole:
        # A layer with a window of its own caches no more than that.
        mask = step.mask(kind, query.device)[..., -key.shape[2] :]
        return _sdpa(query, key, value, scale, attn_mask=mask), None
    if kind == Layer.DENSE and step.texts.is_plain:
        return _sdpa(query, key, value, scale, is_causal=True), None
    return _packed(query, key, value, step, kind, scale), None


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    kind: Layer | int,
    scale: float,
) -> torch.Tensor:
    num_rows, num_heads, num_tokens, head_size = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    rows = step.rows(query.device)

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        tokens = tensor.transpose(1, 2).flatten(0, 1)
        return tokens if rows is None else tokens.index_select(0, rows)

    queries, keys, values = flat(query), flat(key), flat(value)
    alike = zip(step.heads(kind, num_kv_heads), step.plans(kind, query.device), strict=True)
    outputs = []
    for heads, plan in alike:
        first, stop, _ = heads.indices(num_kv_heads)
        own = queries[:, first * group : stop * group]
        outputs.append(packed_attention(own, keys[:, heads], values[:, heads], plan, scale))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    if rows is not None:
        empty = output.new_zeros(num_rows * num_tokens, num_heads, head_size)
        output = empty.index_copy(0, rows, output)
    return output.view(num_rows, num_tokens, num_heads, head_size)


def _own_window(module: Any) -> int | None:
    """Of a layer that does not name its window in the call (Qwen2-MoE)."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    slides = kinds is not None and kinds[module.layer_idx] == "sliding_attention"
    return module.config.sliding_window if slides else None


def _sdpa(query: Any, key: Any, value: Any, scale: float, **options: Any) -> torch.Tensor:
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1], **options
    )
    return attended.transpose(1, 2).contiguous()


def _of_one_type(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast its type, but for float64; else the query's. Rotary embeddings and norms
    compute queries and keys in float32 where values are of a smaller type."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check(
    module: Any, step: Any, dropout: float, attention_mask: Any, kwargs: dict[str, Any]
) -> None:
    name = type(module).__name__
    if step is None:
        raise ValueError(
            f"{name} was called without the hook of vllm_sepllm.training.apply: call the model as "
            "a whole, after apply; load a reference model (TRL) with attn_implementation='sdpa'. "
            "Else its layers do not hand arguments on to attention, so it cannot be trained under "
            "the rule"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError(
            f"{name} was called with is_causal=False: under the rule no token sees a later one; "
            "leave it out"
        )
    if dropout:
        is_old = hasattr(getattr(module, "config", None), "attn_pdrop")  # GPT-2
        option = "attn_pdrop" if is_old else "attention_dropout"
        raise ValueError(
            f"attention dropout is {dropout}: SepLLM attention has none; load the model without, "
            f"e.g. from_pretrained(..., {option}=0.0)"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{name} makes a mask of its own, which SepLLM would leave out: this model cannot be "
            "trained under the rule"
        )
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise ValueError(
                f"{name} wants {option}, which SepLLM attention does not compute in training: this "
                "model can be served under the rule, not trained"
            )
