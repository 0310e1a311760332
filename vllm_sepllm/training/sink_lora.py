"""SinkLoRA's shifted sparse attention, for extending a model's context: :func:`apply_sink_lora`.

SinkLoRA (arXiv 2406.05678) fine-tunes with LongLoRA's idea (arXiv 2309.12307): tokens attend within
groups, and for some heads the groups are shifted by half of one, so that neighbouring groups meet.
SF-Attn shifts the heads of a quarter only, and its first four tokens are seen by all. The code of
its SF-Attn was never published; this is our reading of the paper::

    visible(h, q, k)  =  k <= q  and  ( k < sinks  or  group_h(q) == group_h(k) )
    group_h(p)        =  p // G,  or  (p + G / 2) // G  for the heads of shifted_share

Nothing is rolled around. LongLoRA's own code does that, by which the first half group of shifted
heads sees the end of the text. With ``shifted_share=0.5`` and no sinks it is LongLoRA's S2-Attn
but for that half group.

It is for training. What is extended is then served with full attention, or under SepLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_sepllm.carried import RULE_KEY
from vllm_sepllm.config import ConfigError
from vllm_sepllm.layers import LayerPlan
from vllm_sepllm.training.attach import Attached, base_of, check_model
from vllm_sepllm.training.plan import IdArray, TextPlan


@dataclass(frozen=True)
class GroupPattern:
    """Tokens attend within groups.

    Attributes:
        group_size: ``G``, tokens.
        shifted_share: of the KV heads, the last ones, whose groups are shifted.
        num_sink_tokens: first tokens, seen by all later ones.
    """

    group_size: int
    shifted_share: float
    num_sink_tokens: int

    def heads(self, num_kv_heads: int) -> tuple[slice, ...]:
        """Those whose groups are not shifted, and those whose are.

        Raises:
            ValueError: the share is no whole number of KV heads.
        """
        shifted = self.shifted_share * num_kv_heads
        whole = round(shifted)
        if abs(shifted - whole) > 1e-3:  # 1/3 may be given as 0.333333
            raise ValueError(
                f"shifted_share={self.shifted_share} of {num_kv_heads} KV heads is {shifted:g}: it "
                f"must be a whole number of them, e.g. shifted_share={1 / num_kv_heads:g}"
            )
        first = num_kv_heads - whole
        parts = slice(0, first), slice(first, num_kv_heads)
        return tuple(part for part in parts if part.start < part.stop)

    def text_plans(self, token_ids: IdArray) -> tuple[TextPlan, ...]:
        """Without a shift, and with it; only what :meth:`heads` has."""
        shifts = []
        if self.shifted_share < 1:
            shifts.append(0)
        if self.shifted_share > 0:
            shifts.append(self.group_size // 2)
        return tuple(self._text_plan(token_ids.size, shift) for shift in shifts)

    def _text_plan(self, num_tokens: int, shift: int) -> TextPlan:
        place = np.arange(num_tokens)
        first = np.maximum((place + shift) // self.group_size * self.group_size - shift, 0)
        kept = place[: self.num_sink_tokens]
        limit = np.minimum(first, self.num_sink_tokens)
        nothing = np.zeros((2, num_tokens), dtype=np.int64)
        return TextPlan(kept, first, np.stack([nothing[0], limit]), nothing)


def apply_sink_lora(
    model: Any, group_size: int, shifted_share: float = 0.25, num_sink_tokens: int = 4
) -> Attached:
    """Make a Hugging Face decoder attend within groups while it is trained.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        group_size: tokens of a group; LongLoRA takes a quarter of the training length.
        shifted_share: of the heads; 1/4 is SF-Attn, 1/2 is S2-Attn.
        num_sink_tokens: first tokens that all later ones see; 4 is SF-Attn, 0 is S2-Attn.

    Returns:
        What was put in; :meth:`Attached.remove` takes it out, for evaluation and generation.

    Raises:
        ConfigError: a value is out of range, or the model cannot be trained so.
    """
    model = base_of(model)
    check_model(model)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ConfigError(f"group_size={group_size!r}: must be a whole number of at least 2 tokens")
    if group_size % 2:
        raise ConfigError(
            f"group_size={group_size}: groups are shifted by half of one, so it must be even; set "
            f"{group_size + 1}"
        )
    if not isinstance(shifted_share, int | float) or not 0 <= shifted_share <= 1:
        raise ConfigError(f"shifted_share={shifted_share!r}: must be from 0 to 1, e.g. 0.25")
    if isinstance(num_sink_tokens, bool) or not isinstance(num_sink_tokens, int):
        raise ConfigError(f"num_sink_tokens={num_sink_tokens!r}: must be a whole number, e.g. 4")
    if num_sink_tokens < 0:
        raise ConfigError(f"num_sink_tokens={num_sink_tokens}: must be at least 0; 4 is SinkLoRA's")
    text = model.config.get_text_config(decoder=True)
    pattern = GroupPattern(group_size, shifted_share, num_sink_tokens)
    try:
        pattern.heads(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if hasattr(model.config, RULE_KEY):  # of an earlier training
        delattr(model.config, RULE_KEY)
    attached = Attached(pattern, LayerPlan(), text.num_hidden_layers)
    attached.attach(model)
    return attached
