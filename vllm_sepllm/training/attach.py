"""Put the rule into a Hugging Face model: :func:`apply`.

Three official seams of transformers are used, no code of a model is changed: a name in
``AttentionInterface`` for what computes attention, the same name in ``AttentionMaskInterface`` so
that no mask is made, and a hook before the decoder, which sees the token ids and hands what follows
from them to every layer as a keyword argument.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vllm_sepllm.carried import RULE_KEY, config_of, rule_of
from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.kept_ids import notes_of, resolve_kept
from vllm_sepllm.layers import LayerPlan
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.training.adapters import has_adapter, save_rules_with_adapters
from vllm_sepllm.training.attention import ATTENTION, register
from vllm_sepllm.training.plan import KeptPattern, Pattern
from vllm_sepllm.training.step import KEYWORD, Step, cache_for

_HOOK = "_sepllm_hook"


class Attached:
    """What :func:`apply` put into a model.

    Attributes:
        pattern: what the kept layers see.
        layers: which layers are dense.
        config: the options; ``None`` where none say what is seen.
    """

    def __init__(
        self,
        pattern: Pattern,
        layers: LayerPlan,
        num_layers: int,
        config: SepLLMConfig | None = None,
    ) -> None:
        self.pattern = pattern
        self.layers = layers
        self.config = config
        self._num_layers = num_layers
        self._num_ids = 0  # of the model's vocabulary
        self._handles: list[Any] = []
        self._before: tuple[Any, str] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it is worked out in numpy
    def __call__(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the decoder runs: decide what each token sees."""
        given = _by_name(decoder.forward, args, kwargs)
        if given.get("input_ids") is None:
            raise ValueError(
                "the model was given inputs_embeds: SepLLM decides by token ids, so give input_ids "
                "(prompt tuning and other virtual tokens have none and cannot be used with it)"
            )
        # Without options what is seen does not depend on ids.
        if self.config is not None and decoder.config.vocab_size != self._num_ids:
            raise ValueError(
                f"the vocabulary had {self._num_ids} tokens when SepLLM was applied, and has "
                f"{decoder.config.vocab_size} now: call apply again, with the tokenizer that has "
                "the new ones"
            )
        given["past_key_values"] = cache_for(decoder, given)
        given[KEYWORD] = Step.of(self.pattern, self.layers, self._num_layers, given)
        return (), given

    @staticmethod
    def after(decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Behind the decoder: have its layers asked what they see?"""
        if not kwargs[KEYWORD].is_used:
            raise ValueError(
                f"no layer of {type(decoder).__name__} used SepLLM attention, so the model was "
                "computed without it: it cannot be trained under the rule"
            )

    def attach(self, model: Any) -> None:
        """Into a model; what was there before is taken out."""
        decoder = model.get_decoder()
        earlier = getattr(decoder, _HOOK, None)
        if earlier is not None:
            earlier.remove()
        before = model.config._attn_implementation
        if before == ATTENTION and earlier is None:
            raise ConfigError(
                f"the config of {type(model).__name__} says attn_implementation='sepllm' already: "
                "it is shared with another model under a rule, or was loaded so; give each model a "
                "config of its own (copy.deepcopy), loaded with attn_implementation='sdpa'"
            )
        register()
        model.set_attn_implementation(ATTENTION)
        if decoder.config._attn_implementation != ATTENTION:
            model.set_attn_implementation(before)
            raise ConfigError(
                f"{type(model).__name__} has attention code of its own, which transformers cannot "
                "replace: it cannot be trained under the rule"
            )
        self._before = model, before
        self._num_ids = decoder.config.vocab_size
        self._handles = [
            decoder.register_forward_pre_hook(self, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
        ]
        setattr(decoder, _HOOK, self)

    def remove(self) -> None:
        """The model attends as it did before; its config still carries the rule, and what is saved
        has it."""
        if self._before is None:
            return
        model, implementation = self._before
        for handle in self._handles:
            handle.remove()
        delattr(model.get_decoder(), _HOOK)
        model.set_attn_implementation(implementation)
        self._before = None


def apply(
    model: Any, options: Mapping[str, Any] | SepLLMConfig | None = None, tokenizer: Any = None
) -> Attached:
    """Make a Hugging Face decoder train, evaluate and generate under the rule.

    Trainer, PEFT, TRL's SFTTrainer, gradient checkpointing, packed texts (by ``position_ids``) and
    padding on either side work as they do without. ``model.config.sepllm`` carries the options
    from now on, so a saved model has them in its ``config.json``, and an adapter of PEFT in a file
    beside its weights; serving reads both.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        options: as in ``additional_config["sepllm"]``; ``None`` takes those that the model carries.
        tokenizer: finds the kept tokens; not needed where all are given as ids.

    Returns:
        What was put in; :meth:`Attached.remove` takes it out.

    Raises:
        ConfigError: the options cannot be trained under, or not with this model.
    """
    model = base_of(model)
    config = _checked(_carried(model) if options is None else options)
    check_model(model)
    if config.needs_tokenizer and tokenizer is None:
        raise ConfigError(
            "apply was given no tokenizer: it is needed to find the ids of kept tokens; give it, "
            "or name ids (separator_token_ids=[...])"
        )
    text = model.config.get_text_config(decoder=True)
    kept = resolve_kept(config, tokenizer).below(text.vocab_size)
    for note in notes_of(config, kept):
        warnings.warn(f"SepLLM: {note}", stacklevel=2)
    rule = KeepRule.of(kept.resolve(config), text.vocab_size)
    layers = LayerPlan.of(config.dense_layers, text.num_hidden_layers)
    attached = Attached(KeptPattern(rule), layers, text.num_hidden_layers, config)
    attached.attach(model)
    model.config.sepllm = rule_of(config)
    save_rules_with_adapters(model)
    return attached


def _by_name(function: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, all of them by name."""
    signature = inspect.signature(function)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def base_of(model: Any) -> Any:
    """The model inside a PEFT model."""
    inside = getattr(model, "get_base_model", None)
    model = model if inside is None else inside()
    if not hasattr(model, "get_decoder") or not hasattr(model, "set_attn_implementation"):
        raise ConfigError(
            f"{type(model).__name__} is no causal language model of transformers: SepLLM can be "
            "applied to those only"
        )
    return model


def _carried(model: Any) -> SepLLMConfig:
    """The options that a model carries.

    Raises:
        ConfigError: there are none, or an adapter may have others.
    """
    carried = getattr(model.config, RULE_KEY, None)
    if carried is None:
        raise ConfigError(
            "no options were given and the model's config carries none: give some, e.g. "
            '{"num_sink_tokens": 4, "window_size": 64} (an adapter\'s own are in sepllm.json '
            "beside its weights)"
        )
    if has_adapter(model):
        raise ConfigError(
            "no options were given for a model with an adapter, which may have been trained under "
            f"others than its base: give those of its sepllm.json, or the base's own, {carried}"
        )
    return config_of(carried, f"the config of {type(model).__name__}")


def _checked(options: Mapping[str, Any] | SepLLMConfig) -> SepLLMConfig:
    config = options if isinstance(options, SepLLMConfig) else SepLLMConfig.from_dict(options)
    if config.position_mode != "original":
        raise ConfigError(
            f"position_mode={config.position_mode!r}: training uses the positions of the text; "
            "drop it here, and choose it when serving"
        )
    return replace(config, prefill_kernel="triton", planned_kept_share=None, planning_text=None)


def check_model(model: Any) -> None:
    """Whether its attention can be replaced.

    Raises:
        ConfigError: it does more than what replaces it.
    """
    decoder, name = model.get_decoder(), type(model).__name__
    if not hasattr(decoder, "config"):
        raise ConfigError(
            f"{name} names {type(decoder).__name__} as its decoder, which has no layers: it cannot "
            "be trained under the rule"
        )
    if any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        raise ConfigError(
            f"{name} is not causal: its tokens see later ones, or another text, so it cannot be "
            "trained under the rule"
        )
    text = model.config.get_text_config(decoder=True)
    if text is not model.config:
        raise ConfigError(
            f"{name} reads more than text: only models of text alone can be trained under the rule"
        )
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap:
        raise ConfigError(
            f"{name} caps its logits (attn_logit_softcapping={cap}): training "
            "under SepLLM has no soft cap; such models can be served, not trained"
        )
    kinds = list(getattr(text, "layer_types", None) or ())
    others = sorted({*kinds} - {"full_attention", "sliding_attention"})
    if others:
        raise ConfigError(
            f"{name} has layers of the types {', '.join(others)}: only full and "
            "sliding attention can be trained under the rule"
        )
    slides = bool(kinds) and all(kind == "sliding_attention" for kind in kinds)
    if slides or (not kinds and getattr(text, "sliding_window", None)):
        raise ConfigError(
            f"all layers of {name} have a sliding window ({text.sliding_window}): "
            "they would see nothing else, so there is nothing to keep; set sliding_window to null "
            "in its config to train without it"
        )
