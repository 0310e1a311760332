"""Which token ids of a tokenizer are separators."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.separator_lists import (
    DEFAULT_SEPARATORS,
    SEPARATOR_LISTS,
    separator_texts,
)
from vllm_sepllm.token_texts import Tokenizer, num_token_ids, texts_of, token_texts

__all__ = [
    "Separators",
    "Tokenizer",
    "match_separators",
    "missing_sentence",
    "missing_texts",
    "num_token_ids",
    "resolve_separators",
    "token_texts",
]


@dataclass(frozen=True)
class Separators:
    """Separators found in one tokenizer.

    Attributes:
        token_ids: sorted ids.
        texts: the text of each id, in the same order.
        absent: default separators that were looked up and are no token.
    """

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    absent: tuple[str, ...] = ()

    def below(self, vocab_size: int) -> Separators:
        """Those whose id is below ``vocab_size``."""
        pairs = zip(self.token_ids, self.texts, strict=True)
        inside = [pair for pair in pairs if pair[0] < vocab_size]
        ids, texts = tuple(i for i, _ in inside), tuple(text for _, text in inside)
        return replace(self, token_ids=ids, texts=texts)


_cache: WeakKeyDictionary[Any, dict[tuple[object, ...], Separators]] = WeakKeyDictionary()


def resolve_separators(config: SepLLMConfig, tokenizer: Tokenizer | None) -> Separators:
    """Find the separators ``config`` asks for; remembered per tokenizer and options.

    A policy without separators has none, and given ids are taken as they are: nothing is
    looked up for them. The tokenizer then only shows their texts, if it can.

    Args:
        config: options.
        tokenizer: may be ``None`` where nothing is looked up.

    Raises:
        ConfigError: the tokenizer has none of them, or cannot be read.
    """
    if not config.uses_separators:
        return Separators((), ())
    if config.separator_token_ids is not None:
        ids = config.separator_token_ids
        return Separators(ids, _shown(ids, tokenizer))
    assert tokenizer is not None
    key = (config.separators, config.separator_match, len(tokenizer))  # tokens may be added to it
    found: dict[tuple[object, ...], Separators] = {}
    with suppress(TypeError):  # a tokenizer that cannot be a key is asked again
        found = _cache.setdefault(tokenizer, found)
    if key not in found:
        found[key] = _find(config, tokenizer)
    return found[key]


def _shown(ids: Sequence[int], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Texts of given ids, or "<id 5>" where there is none to show."""
    texts = [""] * len(ids)
    if tokenizer is not None and ids:
        with suppress(Exception):
            texts = texts_of(tokenizer, ids)
    return tuple(text or f"<id {i}>" for i, text in zip(ids, texts, strict=True))


def _find(config: SepLLMConfig, tokenizer: Tokenizer) -> Separators:
    wanted = separator_texts(config.separators)
    texts = readable_texts(tokenizer, "separators", "separator_token_ids")
    ids = match_separators(texts, wanted, config.separator_match)
    if not ids:
        raise ConfigError(
            f"no separator found in the tokenizer's {len(texts)} tokens: looked for "
            f"{list(wanted)!r} with separator_match={config.separator_match!r}; "
            "set separators to texts this tokenizer has, or separator_token_ids"
        )
    found = Separators(ids, tuple(texts[i] for i in ids))
    return replace(found, absent=tuple(missing_texts(config, found).get("default", ())))


def readable_texts(tokenizer: Tokenizer, what: str, remedy: str) -> list[str]:
    """The text of every token id, to find ``what`` in.

    Raises:
        ConfigError: there are none; ``remedy`` is the option to set instead.
    """
    try:
        return token_texts(tokenizer)
    except Exception as error:  # whatever a tokenizer of any kind raises
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(". ")
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot tell the texts of its tokens "
            f"({type(error).__name__}: {reason}), so {what} cannot be looked up: set {remedy} to "
            "their ids"
        ) from error


def match_separators(
    texts: Sequence[str], separators: Sequence[str], match: str
) -> tuple[int, ...]:
    """Ids whose text is a separator.

    Args:
        texts: the text of every token id.
        separators: separator texts.
        match: ``"exact"`` takes tokens that are one separator (the paper's choice);
            ``"composed"`` also takes tokens made of nothing but separator characters,
            such as ``".\\n\\n"`` or ``" ,"``. A separator with letters or digits, such as
            ``"<|im_end|>"``, has no separator characters: it is matched as a whole.
    """
    wanted = frozenset(separators)
    characters = separator_characters(separators) if match == "composed" else frozenset()
    return tuple(
        i
        for i, text in enumerate(texts)
        if text in wanted or (text and characters.issuperset(text))
    )


def separator_characters(separators: Iterable[str]) -> frozenset[str]:
    """Characters of the separators that have neither letters nor digits."""
    return frozenset(char for text in separators if not has_words(text) for char in text)


def has_words(text: str) -> bool:
    """Whether it has letters, the signs that belong to letters, or digits."""
    return any(unicodedata.category(char)[0] in "LMN" for char in text)


def missing_texts(config: SepLLMConfig, found: Separators) -> dict[str, list[str]]:
    """Texts that were looked up and are no token, by the name of their list.

    Texts given themselves are under "". With ``separator_match="composed"`` a text is there if
    each of its characters is part of a separator that was found.

    Args:
        config: options as given.
        found: separators of these options.
    """
    if not config.looks_up_separators:
        return {}  # nothing was looked up
    there = set(found.texts)
    if config.separator_match == "composed":
        characters = frozenset("".join(there)) & separator_characters(
            separator_texts(config.separators)
        )
    else:
        characters = frozenset()

    def is_missing(text: str) -> bool:
        return text not in there and not characters.issuperset(text)

    if config.separators == DEFAULT_SEPARATORS:
        groups = {"default": list(DEFAULT_SEPARATORS)}
    else:
        groups = {name: list(SEPARATOR_LISTS.get(name, ())) for name in config.separators}
        groups = {name: texts for name, texts in groups.items() if texts}
        if "multilingual" in groups:  # which holds the default ones too
            groups["default"] = list(DEFAULT_SEPARATORS)
            groups["multilingual"] = [
                text for text in groups["multilingual"] if text not in DEFAULT_SEPARATORS
            ]
        groups[""] = [text for text in config.separators if text not in SEPARATOR_LISTS]
    missing = {name: list(filter(is_missing, texts)) for name, texts in groups.items()}
    return {name: texts for name, texts in missing.items() if texts}


def missing_sentence(config: SepLLMConfig, found: Separators) -> str | None:
    """That texts are no tokens, named by their list, and what to do; ``None`` if all are.

    The paper's nine suit every language a little: one that is no token is no reason to worry, and
    is left out. It is in ``found.absent``.
    """
    missing = missing_texts(config, found)
    missing.pop("default", None)
    if not missing:
        return None
    parts = []
    for name, texts in missing.items():
        shown = " ".join(map(repr, texts))
        if name:
            total = len(SEPARATOR_LISTS[name])
            parts.append(f"{len(texts)} of {total} texts of {name!r} ({shown})")
        else:
            parts.append(shown)
            for text in texts:
                near = difflib.get_close_matches(text.strip().lower(), SEPARATOR_LISTS, n=1)
                if near:
                    parts[-1] += f" (did you mean the list {near[0]!r}?)"
    several = len(missing) > 1 or any(len(texts) > 1 for texts in missing.values())
    return (
        f"{', '.join(parts)} {'are no single tokens' if several else 'is no single token'} in this "
        "tokenizer, so nothing is kept for them: leave them out, or set separator_token_ids"
    )
