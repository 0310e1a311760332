"""Which tokens of a text SepLLM attends to, for people to look at.

The last token of the text is the query; each token gets the one reason why it is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from vllm_sepllm.policy import KeptPolicy
from vllm_sepllm.separators import token_texts


class TokenClass(StrEnum):
    """Why the last query sees a token, or that it does not."""

    SINK = "sink"
    SEPARATOR = "separator"
    WINDOW = "window"
    DROPPED = "dropped"


LEGEND = {
    TokenClass.SINK: "one of the first tokens, always seen",
    TokenClass.SEPARATOR: "separator outside the window, seen all the same",
    TokenClass.WINDOW: "the last token and those just before it",
    TokenClass.DROPPED: "not seen any more, its KV cache is freed",
}


@dataclass(frozen=True)
class Token:
    """One token as shown.

    Attributes:
        position: index in the text's tokens.
        token_id: id in the vocabulary.
        text: its part of the text; all parts together are the text.
        kind: why it is seen.
    """

    position: int
    token_id: int
    text: str
    kind: TokenClass


@dataclass(frozen=True)
class Summary:
    """Counts over one text; all but the pages are in tokens.

    Attributes:
        num_tokens: tokens of the text.
        num_of: tokens of each class.
        num_kept: sinks and separators, those inside the window included.
        block_size: tokens per page.
        kept_pages, window_pages, full_pages: pages of the stream, of the last query's window, and
            of full attention.
    """

    num_tokens: int
    num_of: dict[TokenClass, int]
    num_kept: int
    block_size: int
    kept_pages: int
    window_pages: int
    full_pages: int

    @property
    def share(self) -> float:
        """Share of the tokens that the last query sees."""
        return 1 - self.num_of[TokenClass.DROPPED] / self.num_tokens


@dataclass(frozen=True)
class Inspection:
    """What the renderers show.

    Attributes:
        head, tail: tokens before and after the ones left out.
        num_hidden: tokens left out.
        summary: counts over all tokens.
    """

    head: list[Token]
    num_hidden: int
    tail: list[Token]
    summary: Summary


def inspect_text(
    tokenizer: Any, policy: KeptPolicy, text: str, block_size: int, limit: int
) -> Inspection:
    """Tokenize, classify and count ``text``; show ``limit`` tokens of its two ends, 0 for all.

    Raises:
        ValueError: the tokenizer makes no tokens of the text.
    """
    ids, parts = tokenize(tokenizer, text)
    if not ids:
        raise ValueError("the text has no tokens in this tokenizer: give a longer text")
    classes = classify(ids, policy)
    tokens = [Token(*each) for each in zip(range(len(ids)), ids, parts, classes, strict=True)]
    shown = len(tokens) if limit == 0 else min(limit, len(tokens))
    split, hidden = shown - shown // 2, len(tokens) - shown
    return Inspection(
        tokens[:split], hidden, tokens[split + hidden :], summarize(ids, policy, block_size)
    )


def classify(token_ids: Sequence[int], policy: KeptPolicy) -> list[TokenClass]:
    """Why the last of ``token_ids`` sees each of them.

    The classes are disjoint. The window comes first, so that sinks and separators together are
    the stream entries below the last query's limit.

    Args:
        token_ids: ``[num_tokens]``, from position 0 on.
        policy: sinks, window and separators.
    """
    if not len(token_ids):
        return []
    kept = policy.kept_flags(token_ids)
    start = int(policy.window_start(len(token_ids) - 1))
    first_entry = int(policy.stream_start(int(kept[:start].sum())))
    entries = kept.cumsum() - 1  # of kept tokens
    classes = []
    for position, flag in enumerate(kept):
        if position >= start:
            classes.append(TokenClass.WINDOW)
        elif not flag or policy.num_sink_tokens <= entries[position] < first_entry:
            classes.append(TokenClass.DROPPED)
        elif position < policy.num_sink_tokens:
            classes.append(TokenClass.SINK)
        else:
            classes.append(TokenClass.SEPARATOR)
    return classes


def summarize(token_ids: Sequence[int], policy: KeptPolicy, block_size: int) -> Summary:
    """Count classes and pages; ``token_ids`` holds at least one token."""
    num_tokens = len(token_ids)
    counted = Counter(classify(token_ids, policy))
    kept = policy.kept_flags(token_ids)
    num_kept = int(np.count_nonzero(kept))
    last = num_tokens - 1
    before_window = int(kept[: int(policy.window_start(last))].sum())
    sink_pages = -(-policy.num_sink_tokens // block_size)
    left = max(0, int(policy.stream_start(before_window)) // block_size - sink_pages)
    return Summary(
        num_tokens=num_tokens,
        num_of={kind: counted[kind] for kind in TokenClass},
        num_kept=num_kept,
        block_size=block_size,
        kept_pages=-(-num_kept // block_size) - left,
        window_pages=last // block_size - int(policy.window_start(last)) // block_size + 1,
        full_pages=-(-num_tokens // block_size),
    )


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The summary as ``(what, value)`` texts."""
    rows = [("tokens", f"{summary.num_tokens:,}")]
    plural = {TokenClass.SINK: "sinks", TokenClass.SEPARATOR: "separators outside the window"}
    rows += [(plural.get(kind, kind.value), f"{n:,}") for kind, n in summary.num_of.items()]
    pages = summary.kept_pages + summary.window_pages
    return [
        *rows,
        ("seen by the last token", f"{summary.share:.1%}"),
        (
            f"pages of {summary.block_size} tokens, SepLLM",
            f"{pages:,} ({summary.kept_pages:,} kept + {summary.window_pages:,} window)",
        ),
        (f"pages of {summary.block_size} tokens, full attention", f"{summary.full_pages:,}"),
    ]


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


def visible_text(text: str) -> str:
    """``text`` with line ends marked and control characters drawn, none of them left in it."""
    drawn = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
    drawn |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
    return text.translate(drawn | {0x0A: "↵\n", 0x09: "\t"})
