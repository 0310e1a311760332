"""How much of a text is attended to."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.kept_ids import resolve_kept
from vllm_sepllm.layers import LayerPlan
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.separators import Tokenizer, num_token_ids


def num_attended(config: SepLLMConfig, tokenizer: Tokenizer, token_ids: Sequence[int]) -> int:
    """Tokens that the last of ``token_ids`` attends to, its own included.

    Args:
        config: options as given.
        tokenizer: finds the tokens that are kept.
        token_ids: at least one, from position 0 on.

    Raises:
        ConfigError: a token that is to be kept is not in the tokenizer.
    """
    return _num_attended(rule_of(config, tokenizer), token_ids)


def rule_of(config: SepLLMConfig, tokenizer: Tokenizer) -> KeepRule:
    """The rule of options as given.

    Raises:
        ConfigError: a token that is to be kept is not in the tokenizer.
    """
    found = resolve_kept(config, tokenizer)
    return KeepRule.of(found.resolve(config), num_token_ids(tokenizer))


def _num_attended(rule: KeepRule, token_ids: Sequence[int]) -> int:
    start = int(rule.window_start(len(token_ids) - 1))
    limit = int(rule.kept_flags(token_ids[:start]).sum())
    sinks, first = rule.seen.parts(limit)
    return sinks + limit - first + len(token_ids) - start


def window_of_equal_share(
    config: SepLLMConfig, tokenizer: Tokenizer, token_ids: Sequence[int]
) -> SepLLMConfig:
    """StreamingLLM with as many sinks, whose last query attends to as many tokens."""
    return streaming_like(config, num_attended(config, tokenizer, token_ids))


def streaming_like(config: SepLLMConfig, attended: float) -> SepLLMConfig:
    """StreamingLLM with the sinks and positions of ``config``, attending to ``attended`` tokens."""
    return SepLLMConfig(
        policy="streaming",
        num_sink_tokens=config.num_sink_tokens,
        window_size=max(1, round(attended) - config.num_sink_tokens),
        position_mode=config.position_mode,
    )


def mean_attended(
    config: SepLLMConfig | None,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[int]],
    num_layers: int,
) -> float:
    """Tokens that the last of a text attends to, mean over texts and over a model's layers.

    Args:
        config: options as given; ``None`` is full attention.
        tokenizer: finds the tokens that are kept.
        texts: token ids of each, from position 0 on.
        num_layers: of the model; dense ones attend to everything.

    Raises:
        ConfigError: see :func:`num_attended`; a dense layer does not exist.
    """
    everything = sum(len(text) for text in texts) / len(texts)
    if config is None:
        return everything
    dense = len(LayerPlan.of(config.dense_layers, num_layers).dense) / num_layers
    rule = rule_of(config, tokenizer)
    kept = sum(_num_attended(rule, text) for text in texts) / len(texts)
    return dense * everything + (1 - dense) * kept
