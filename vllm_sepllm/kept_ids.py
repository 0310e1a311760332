"""Which token ids stay behind the window: the option ``keep``, in the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.keep_classes import KEEP_CLASSES, LISTED, SEPARATORS
from vllm_sepllm.separator_lists import DEFAULT_SEGMENT_ENDS
from vllm_sepllm.separators import (
    Separators,
    Tokenizer,
    has_words,
    missing_sentence,
    readable_texts,
    resolve_separators,
    token_texts,
)


@dataclass(frozen=True)
class KeptIds:
    """What ``keep`` stands for in one tokenizer.

    Attributes:
        by_class: sorted ids by class, in the order of ``keep``; those listed one by one are under
            ``LISTED``. An id can be of several classes.
        separators: with their texts.
        missing: texts of ``keep`` that are no single token.
        given: ids that the options hold as numbers.
        keep_after: tokens kept behind ids, and these ids.
        segment_ends: ids of tokens that end a segment; none without ``keep_after``.
        missing_ends: texts of ``segment_ends`` given by the user that end none.
    """

    by_class: dict[str, tuple[int, ...]]
    separators: Separators
    missing: tuple[str, ...] = ()
    given: frozenset[int] = frozenset()
    keep_after: tuple[tuple[int, tuple[int, ...]], ...] = ()
    segment_ends: tuple[int, ...] = ()
    missing_ends: tuple[str, ...] = ()

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """All of them, sorted."""
        return tuple(sorted({i for ids in self.by_class.values() for i in ids}))

    def below(self, vocab_size: int) -> KeptIds:
        """Those whose id is below ``vocab_size``, and given ones, which are refused if they are
        not."""

        def below(ids: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i for i in ids if i < vocab_size or i in self.given)

        return replace(
            self,
            by_class={name: below(ids) for name, ids in self.by_class.items()},
            separators=self.separators.below(vocab_size),
            keep_after=tuple((number, below(ids)) for number, ids in self.keep_after),
            segment_ends=below(self.segment_ends),
        )

    def resolve(self, config: SepLLMConfig) -> SepLLMConfig:
        """``config`` with these ids in the place of whatever names them."""
        return config.with_kept_ids(self.token_ids, self.keep_after, self.segment_ends)


def resolve_kept(config: SepLLMConfig, tokenizer: Tokenizer | None) -> KeptIds:
    """Find the tokens that ``config.keep`` asks for.

    Ids that are given are taken as they are, and nothing is looked up for them.

    Args:
        config: options.
        tokenizer: may be ``None`` where nothing is looked up.

    Raises:
        ConfigError: the tokenizer has no token of a class, or cannot be read.
    """
    separators = resolve_separators(config, tokenizer)
    found: dict[str, tuple[int, ...]] = {}
    if not config.method.uses_keep:
        return KeptIds(found, separators)
    for item in config.keep:
        if item == SEPARATORS:
            found[item] = separators.token_ids
        elif item in KEEP_CLASSES:
            assert tokenizer is not None
            found[str(item)] = _ids_of_class(str(item), tokenizer)
        else:
            found.setdefault(LISTED, ())
    listed, missing = _listed(config, tokenizer)
    if LISTED in found:
        found[LISTED] = listed
    given = {item for item in config.keep if isinstance(item, int)}
    if config.uses_separators:
        given.update(config.separator_token_ids or ())
    kept = KeptIds(found, separators, missing, frozenset(given))
    return _with_spans(kept, config, tokenizer) if config.keep_after else kept


def _with_spans(kept: KeptIds, config: SepLLMConfig, tokenizer: Tokenizer | None) -> KeptIds:
    """The same with what ``keep_after`` and ``segment_ends`` ask for."""
    pairs = []
    for number, items in config.keep_after:
        ids: set[int] = set()
        for item in items:
            if isinstance(item, int):
                ids.add(item)
            elif item in KEEP_CLASSES:
                ids.update(kept.by_class[item])
            elif tokenizer is not None:
                ids.update(i for i, text in enumerate(token_texts(tokenizer)) if text == item)
        pairs.append((number, tuple(sorted(ids))))
    ends = {item for item in config.segment_ends if isinstance(item, int)}
    wanted = [item for item in config.segment_ends if isinstance(item, str)]
    missing: tuple[str, ...] = ()
    if wanted:
        assert tokenizer is not None
        texts = readable_texts(tokenizer, "segment_ends", "segment_ends")
        ends_of = {text: ending_ids(texts, text) for text in wanted}
        ends.update(*ends_of.values())
        if config.segment_ends != DEFAULT_SEGMENT_ENDS:
            missing = tuple(text for text, ids in ends_of.items() if not ids)
    return replace(
        kept,
        keep_after=tuple(pairs),
        segment_ends=tuple(sorted(ends)),
        missing_ends=missing,
        given=kept.given.union(item for item in config.segment_ends if isinstance(item, int)),
    )


def ending_ids(texts: Sequence[str], end: str) -> set[int]:
    """Ids of the tokens that end a segment with ``end``: tokens of that text, and those that have
    it in them and neither letters nor digits, as ``"?\""`` and ``".\\n\\n"`` have."""
    return {
        i for i, text in enumerate(texts) if text == end or (end in text and not has_words(text))
    }


def _ids_of_class(name: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    found = KEEP_CLASSES[name]
    if found.ids is not None:
        ids = found.ids(tokenizer)
    else:
        assert found.has_text is not None
        texts = readable_texts(tokenizer, f"tokens of the class {name!r}", "keep")
        ids = tuple(i for i, text in enumerate(texts) if found.has_text(text))
    if not ids:
        raise ConfigError(
            f"keep holds {name!r}: the tokenizer ({type(tokenizer).__name__}) has no such token; "
            "leave it out, or name token ids instead"
        )
    return ids


def _listed(
    config: SepLLMConfig, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids of what is listed one by one, and texts that are no single token."""
    ids = {item for item in config.keep if isinstance(item, int)}
    wanted = dict.fromkeys(
        item for item in config.keep if isinstance(item, str) and item not in KEEP_CLASSES
    )
    if not wanted:
        return tuple(sorted(ids)), ()
    assert tokenizer is not None
    texts = readable_texts(tokenizer, "texts of keep", "keep")
    ids.update(i for i, text in enumerate(texts) if text in wanted)
    there = {texts[i] for i in ids if i < len(texts)}
    missing = tuple(text for text in wanted if text not in there)
    if not ids:
        raise ConfigError(
            f"keep holds {', '.join(map(repr, missing))}: no single token of this tokenizer has "
            f"such a text; classes are {', '.join(KEEP_CLASSES)}"
        )
    return tuple(sorted(ids)), missing


def notes_of(config: SepLLMConfig, found: KeptIds) -> list[str]:
    """What is worth a warning about texts that are no tokens, one sentence each without its full
    stop."""
    sentence = missing_sentence(config, found.separators)
    notes = [] if sentence is None else [sentence]
    if found.missing:
        shown = " ".join(map(repr, found.missing))
        several = len(found.missing) > 1
        notes.append(
            f"{shown} of keep {'are no single tokens' if several else 'is no single token'} in "
            f"this tokenizer, so nothing is kept for {'them' if several else 'it'}: leave "
            f"{'them' if several else 'it'} out (classes are {', '.join(KEEP_CLASSES)})"
        )
    if found.missing_ends:
        it = "it" if len(found.missing_ends) == 1 else "them"
        notes.append(
            f"{' '.join(map(repr, found.missing_ends))} of segment_ends: no token of this "
            f"tokenizer has such a text, so nothing ends there; leave {it} out"
        )
    return notes
