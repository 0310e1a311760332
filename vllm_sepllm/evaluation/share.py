"""How much of a text is attended to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

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
    rule = rule_of(config, tokenizer)
    return round(Counted(rule, [token_ids]).at_end(rule.window_size))


def rule_of(config: SepLLMConfig, tokenizer: Tokenizer) -> KeepRule:
    """The rule of options as given.

    Raises:
        ConfigError: a token that is to be kept is not in the tokenizer.
    """
    found = resolve_kept(config, tokenizer)
    return KeepRule.of(found.resolve(config), num_token_ids(tokenizer))


class Counted:
    """How many tokens are attended to under a rule, whatever its window.

    Args:
        rule: of which the window is not used: what is kept does not depend on it.
        texts: token ids of each, from position 0 on.
    """

    def __init__(self, rule: KeepRule, texts: Sequence[Sequence[int]]) -> None:
        self._seen = rule.seen
        self._kept = [np.concatenate([[0], rule.kept_flags(text).cumsum()]) for text in texts]

    @property
    def lengths(self) -> list[int]:
        """Of the texts, tokens."""
        return [len(kept) - 1 for kept in self._kept]

    def at_end(self, window: int) -> float:
        """Tokens that the last one of a text attends to, mean over texts."""
        return self._mean(window, lambda length: np.array([length - 1]))

    def over_half(self, window: int) -> float:
        """Tokens attended to where the second half of a text is predicted, mean over texts."""
        return self._mean(window, lambda length: np.arange(max(1, length // 2) - 1, length - 1))

    def _mean(self, window: int, queries: Callable[[int], npt.NDArray[np.int64]]) -> float:
        total = 0.0
        for kept in self._kept:
            at = queries(len(kept) - 1)
            start = np.maximum(0, at - window + 1)
            limit = kept[start]
            sinks = np.minimum(self._seen.num_sink_tokens, limit)
            first = self._seen.first_entries(limit)
            stream = np.where(first > sinks, sinks + limit - first, limit)  # or sinks are in it
            total += float((stream + at + 1 - start).mean())
        return total / len(self._kept)


def window_of_equal_share(
    config: SepLLMConfig, tokenizer: Tokenizer, token_ids: Sequence[int]
) -> SepLLMConfig:
    """StreamingLLM with as many sinks, whose last query attends to as many tokens."""
    window = num_attended(config, tokenizer, token_ids) - config.num_sink_tokens
    return streaming_like(config, max(1, window))


def streaming_like(config: SepLLMConfig, window: int) -> SepLLMConfig:
    """StreamingLLM with the sinks and positions of ``config``."""
    return SepLLMConfig(
        policy="streaming",
        num_sink_tokens=config.num_sink_tokens,
        window_size=window,
        position_mode=config.position_mode,
    )


def mean_attended(
    config: SepLLMConfig | None,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[int]],
    num_layers: int,
    over_half: bool = False,
) -> float:
    """Tokens attended to, mean over texts and over a model's layers.

    Args:
        config: options as given; ``None`` is full attention.
        tokenizer: finds the tokens that are kept.
        texts: token ids of each, from position 0 on.
        num_layers: of the model; dense ones attend to everything.
        over_half: where the second half of a text is predicted, instead of by its last token.

    Raises:
        ConfigError: see :func:`num_attended`; a dense layer does not exist.
    """
    config_of_all = config or SepLLMConfig(policy="streaming")
    rule = rule_of(config_of_all, tokenizer)
    counted = Counted(rule, texts)
    count = counted.over_half if over_half else counted.at_end
    everything = count(max(counted.lengths))
    if config is None:
        return everything
    dense = len(LayerPlan.of(config.dense_layers, num_layers).dense) / num_layers
    return dense * everything + (1 - dense) * count(rule.window_size)


def equal_window(
    config: SepLLMConfig,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[int]],
    num_layers: int,
    over_half: bool = False,
) -> int:
    """The window with which StreamingLLM attends to as many tokens, to the nearest.

    Args, Raises: see :func:`mean_attended`.
    """
    wanted = mean_attended(config, tokenizer, texts, num_layers, over_half)
    counted = Counted(rule_of(streaming_like(config, 1), tokenizer), texts)
    count = counted.over_half if over_half else counted.at_end
    low, high = 1, max(counted.lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(middle) < wanted else (low, middle)
    return min((low, max(1, low - 1)), key=lambda window: abs(count(window) - wanted))
