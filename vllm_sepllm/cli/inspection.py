"""Which tokens of a text SepLLM attends to, for people to look at.

The last token of the text is the query; each token gets the one reason why it is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from vllm_sepllm.cli.inspection_advice import Better, better_separators, keeps_next_to_nothing
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.keep_classes import BEHIND, SEPARATORS
from vllm_sepllm.kept_ids import KeptIds, resolve_kept
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.separators import (
    missing_texts,
    num_token_ids,
    token_texts,
)


class TokenClass(StrEnum):
    """Why the last query sees a token, or that it does not."""

    SINK = "sink"
    CHOSEN = "chosen"  # by the policy: with "sepllm" a separator
    WINDOW = "window"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Token:
    """One token as shown.

    Attributes:
        position: index in the text's tokens.
        token_id: id in the vocabulary.
        text: its part of the text; all parts together are the text.
        kind: why it is seen: a :class:`TokenClass`, the name of a class of ``keep``, or ``BEHIND``.
    """

    position: int
    token_id: int
    text: str
    kind: str


@dataclass(frozen=True)
class Summary:
    """Counts over one text; all but the pages are in tokens.

    Attributes:
        num_tokens: tokens of the text.
        num_of: tokens of each class.
        num_kept: sinks and chosen tokens, those inside the window included.
        num_between: tokens between sinks and window.
        num_chosen_between: those of them that the policy chooses, whatever its bound.
        block_size: tokens per page.
        kept_pages, window_pages, full_pages: pages of the stream, of the last query's window, and
            of full attention.
    """

    num_tokens: int
    num_of: Counter[str]
    num_kept: int
    num_between: int
    num_chosen_between: int
    block_size: int
    kept_pages: int
    window_pages: int
    full_pages: int

    @property
    def num_seen(self) -> int:
        """Tokens that the last query sees."""
        return self.num_tokens - self.num_of[TokenClass.DROPPED]


@dataclass(frozen=True)
class Excerpt:
    """The tokens that are shown.

    Attributes:
        head, tail: tokens before and after the ones left out.
        num_hidden: tokens left out.
    """

    head: list[Token]
    num_hidden: int
    tail: list[Token]


@dataclass(frozen=True)
class Inspection:
    """A text with the reason of each token.

    Attributes:
        config: options as given.
        found: token ids of what ``keep`` names.
        missing: texts asked for that are no token, by the name of their list, "" without one.
        better: where the text has next to none of the separators, what has more.
        token_ids, texts, kinds: ``[num_tokens]``, as in :class:`Token`.
        reasons: ``[num_tokens]``, see :func:`kept_kinds`.
        summary: counts over all tokens.
    """

    config: SepLLMConfig
    found: KeptIds
    missing: dict[str, list[str]]
    better: Better | None
    token_ids: list[int]
    texts: list[str]
    kinds: list[str]
    reasons: list[str]
    summary: Summary

    def ends(self, limit: int) -> Excerpt:
        """``limit`` tokens of both ends together, 0 for all."""
        total = len(self.token_ids)
        if limit == 0 or limit >= total:
            return self.excerpt(total, 0)
        return self.excerpt(limit - limit // 2, limit // 2)

    def excerpt(self, num_head: int, num_tail: int) -> Excerpt:
        """So many tokens of the beginning and of the end; no token is shown twice."""
        total = len(self.token_ids)
        num_head = min(num_head, total)
        start = max(num_head, total - num_tail)
        return Excerpt(self._tokens(0, num_head), start - num_head, self._tokens(start, total))

    def _tokens(self, start: int, stop: int) -> list[Token]:
        parts = (each[start:stop] for each in (self.token_ids, self.texts, self.kinds))
        return [Token(*each) for each in zip(range(start, stop), *parts, strict=True)]


def inspect_text(tokenizer: Any, config: SepLLMConfig, text: str, block_size: int) -> Inspection:
    """Tokenize, classify and count ``text``.

    Args:
        tokenizer: one of ``transformers``.
        config: options as given.
        text: at least one character.
        block_size: tokens per page.

    Raises:
        ConfigError: the tokenizer has none of the separators.
        ValueError: the tokenizer makes no tokens of the text, or a separator's id lies outside
            its vocabulary.
    """
    found = resolve_kept(config, tokenizer)
    rule = KeepRule.of(found.resolve(config), num_token_ids(tokenizer))
    ids, parts = tokenize(tokenizer, text)
    if not ids:
        raise ValueError("the text has no tokens in this tokenizer: give a longer text")
    kinds = classify(ids, rule, found.by_class)
    summary = summarize(ids, rule, block_size, kinds)
    better = None
    if keeps_next_to_nothing(config, summary.num_chosen_between, summary.num_between):
        start = config.num_sink_tokens
        between = ids[start : start + summary.num_between]
        better = better_separators(config, token_texts(tokenizer), between)
    missing = missing_texts(config, found.separators)
    reasons = kept_kinds(ids, rule, found.by_class)
    return Inspection(config, found, missing, better, ids, parts, kinds, reasons, summary)


def classify(
    token_ids: Sequence[int], rule: KeepRule, by_class: Mapping[str, Sequence[int]] | None = None
) -> list[str]:
    """Why the last of ``token_ids`` sees each of them.

    The classes are disjoint. The window comes first, so that sinks and chosen tokens together are
    the stream entries below the last query's limit.

    Args:
        token_ids: ``[num_tokens]``, from position 0 on.
        rule: sinks, window and what is kept beside them.
        by_class: ids of each class that is kept; one of several classes is of the first.
    """
    reasons = kept_kinds(token_ids, rule, by_class)
    start = int(rule.window_start(len(reasons) - 1))
    entries = [i for i, kind in enumerate(reasons[:start]) if kind is not TokenClass.DROPPED]
    for position in entries[rule.num_sink_tokens : rule.seen.first_entry(len(entries))]:
        reasons[position] = TokenClass.DROPPED  # beyond the bound
    return reasons[:start] + [TokenClass.WINDOW] * (len(reasons) - start)


def kept_kinds(
    token_ids: Sequence[int], rule: KeepRule, by_class: Mapping[str, Sequence[int]] | None = None
) -> list[str]:
    """Why each of ``token_ids`` is kept, wherever the window is; ``DROPPED`` if it is not.

    It depends on the tokens up to each one alone. Arguments are those of :func:`classify`.
    """
    if not len(token_ids):
        return []
    kind_of: dict[int, str] = {}
    for name, ids in (by_class or {}).items():
        kind_of = {**dict.fromkeys(ids, kind_of_class(name)), **kind_of}
    if rule.spans is not None:
        others = set(token_ids).difference(np.flatnonzero(rule.is_kept).tolist())
        kind_of |= dict.fromkeys(others, BEHIND)
    kinds: list[str] = []
    for token_id, is_kept in zip(token_ids, rule.kept_flags(token_ids).tolist(), strict=True):
        kind = kind_of.get(token_id, TokenClass.CHOSEN) if is_kept else TokenClass.DROPPED
        kinds.append(TokenClass.SINK if len(kinds) < rule.num_sink_tokens else kind)
    return kinds


def kind_of_class(name: str) -> str:
    """Why a token of a class of ``keep`` is seen."""
    return TokenClass.CHOSEN if name == SEPARATORS else name


def summarize(
    token_ids: Sequence[int],
    rule: KeepRule,
    block_size: int,
    kinds: Sequence[str] | None = None,
) -> Summary:
    """Count classes and pages.

    Args:
        token_ids: at least one.
        rule: sinks, window and what is kept beside them.
        block_size: tokens per page.
        kinds: of :func:`classify`, where classes were named.
    """
    num_tokens = len(token_ids)
    kept = rule.kept_flags(token_ids)
    num_kept = int(np.count_nonzero(kept))
    last, sinks = num_tokens - 1, rule.num_sink_tokens
    start = int(rule.window_start(last))
    left, stop = rule.seen.unseen_pages(int(kept[:start].sum()), block_size)
    return Summary(
        num_tokens=num_tokens,
        num_of=Counter(kinds or classify(token_ids, rule)),
        num_kept=num_kept,
        num_between=max(0, start - sinks),
        num_chosen_between=int(kept[sinks:start].sum()),
        block_size=block_size,
        kept_pages=-(-num_kept // block_size) - (stop - left),
        window_pages=last // block_size - start // block_size + 1,
        full_pages=-(-num_tokens // block_size),
    )


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Token ids of ``text``, special tokens as in a prompt, and the part of it each one shows.

    Special tokens that the tokenizer adds show their own text; all other parts, joined, are
    ``text``. A character cut into several tokens is shown with the first of them.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_offsets_mapping=fast, return_special_tokens_mask=True)
    ids: list[int] = list(encoded["input_ids"])
    ends = [stop for _, stop in encoded["offset_mapping"]] if fast else [None] * len(ids)
    texts = token_texts(tokenizer)
    parts, cursor, last = [], 0, -1
    for token_id, added, end in zip(ids, encoded["special_tokens_mask"], ends, strict=True):
        own = texts[token_id] if token_id < len(texts) else ""
        if added:
            parts.append(own)
            continue
        if end is not None and not text.startswith(own, cursor):
            own = text[cursor:end]  # part of a character, or text that the tokenizer rewrote
        parts.append(own)
        cursor, last = cursor + len(own), len(parts) - 1
    if fast and last >= 0:
        parts[last] += text[cursor:]
    return ids, parts


_DRAWN: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    **dict.fromkeys(range(0x7F, 0xA0), "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # surrogates: no encoding has them
    **dict.fromkeys((0x2028, 0x2029), "\ufffd"),  # line ends to some terminals
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd"),  # reorder text
    0x09: "\t",
    0x0A: "↵\n",
    0x7F: "\u2421",
}


def visible_text(text: str) -> str:
    """``text`` with line ends marked and control characters drawn, none of them left in it."""
    return text.translate(_DRAWN)
