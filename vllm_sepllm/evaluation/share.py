"""How much of a text is attended to."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.kept_ids import resolve_kept
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
    found = resolve_kept(config, tokenizer)
    rule = KeepRule.of(found.resolve(config), num_token_ids(tokenizer))
    start = int(rule.window_start(len(token_ids) - 1))
    limit = int(rule.kept_flags(token_ids[:start]).sum())
    sinks, first = rule.seen.parts(limit)
    return sinks + limit - first + len(token_ids) - start


def window_of_equal_share(
    config: SepLLMConfig, tokenizer: Tokenizer, token_ids: Sequence[int]
) -> SepLLMConfig:
    """StreamingLLM with as many sinks, whose last query attends to as many tokens."""
    window = num_attended(config, tokenizer, token_ids) - config.num_sink_tokens
    return SepLLMConfig(
        policy="streaming",
        num_sink_tokens=config.num_sink_tokens,
        window_size=max(1, window),
        position_mode=config.position_mode,
    )
