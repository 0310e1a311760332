"""Separators that would keep more of a text than those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_sepllm.config import SEPARATOR_MATCHES, SepLLMConfig
from vllm_sepllm.planning import NEXT_TO_NOTHING
from vllm_sepllm.separator_lists import DEFAULT_SEPARATORS, SEPARATOR_LISTS, separator_texts
from vllm_sepllm.separators import match_separators

LEAST_TOKENS = 32  # fewer tokens between sinks and window say nothing about a text


def keeps_next_to_nothing(config: SepLLMConfig, num_chosen: int, num_tokens: int) -> bool:
    """Whether separators were asked for and a text of some length has next to none.

    The bound on separators is left out: it keeps few on purpose.

    Args:
        config: options as given.
        num_chosen: tokens that are kept, of those between sinks and window.
        num_tokens: tokens between sinks and window.
    """
    return (
        config.uses_separators
        and not config.keeps_nothing
        and num_tokens >= LEAST_TOKENS
        and num_chosen < NEXT_TO_NOTHING * num_tokens
    )


@dataclass(frozen=True)
class Better:
    """Separators that a text has more of.

    Attributes:
        separators: names of lists and texts.
        match: ``separator_match``.
        share: of the tokens between sinks and window.
    """

    separators: tuple[str, ...]
    match: str
    share: float


def better_separators(
    config: SepLLMConfig, texts: Sequence[str], token_ids: Sequence[int]
) -> Better | None:
    """The list that, added to the separators, keeps most of ``token_ids``; ``None`` if none helps.

    Lists are tried with ``separator_match="exact"`` first, as the paper has it.

    Args:
        config: options as given.
        texts: the text of every token id.
        token_ids: tokens between sinks and window.
    """
    own = config.separators
    if own == DEFAULT_SEPARATORS or config.separator_token_ids is not None:
        own = ("default",)
    for match in SEPARATOR_MATCHES:
        tried = []
        for name in SEPARATOR_LISTS:
            wanted = tuple(dict.fromkeys((*own, name)))
            ids = match_separators(texts, separator_texts(wanted), match)
            tried.append(Better(wanted, match, float(np.isin(token_ids, ids).mean())))
        best = max(tried, key=lambda each: each.share)  # the first of equals
        if best.share >= NEXT_TO_NOTHING:
            return best
    return None
