"""Which token ids of a tokenizer are separators.

A token's text is read *in context*: decoded behind another token and cut from there. Decoded
on their own, SentencePiece tokens lose the leading space that tells ``" ,"`` from ``","``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.policy import KeptPolicy

_ANCHOR_TEXT = "a"
ENGLISH_SAMPLE = """\
The ferry was late again, and the old man who sold tickets had stopped pretending to care. \
"It will come," he said, "or it will not come." He folded his newspaper, laid it on the sill, \
and looked out over the grey water.

Nobody answered him. A woman with two children moved closer to the stove; the younger child, \
half asleep, held a paper boat against her coat. What would they do if the weather turned? \
There was no inn on this side of the river, no house with a light, nothing but reeds and mud \
and the long road back to town.

At last a whistle sounded, thin and far away. The children ran to the window. "There!" cried \
the boy. "I saw it first!" And so he had: a yellow spark, rising and falling, drew slowly nearer \
through the rain. The ticket seller sighed, put on his cap, and went out to catch the rope.
"""


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every Hugging Face tokenizer has it."""

    def __len__(self) -> int: ...

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class Separators:
    """Separators found in one tokenizer.

    Attributes:
        token_ids: sorted ids.
        texts: the text of each id, in the same order.
    """

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]

    def below(self, vocab_size: int) -> Separators:
        """Those whose id is below ``vocab_size``."""
        pairs = zip(self.token_ids, self.texts, strict=True)
        inside = [pair for pair in pairs if pair[0] < vocab_size]
        return Separators(tuple(i for i, _ in inside), tuple(text for _, text in inside))


_cache: WeakKeyDictionary[Any, dict[tuple[object, ...], Separators]] = WeakKeyDictionary()
_texts_cache: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


def resolve_separators(config: SepLLMConfig, tokenizer: Tokenizer) -> Separators:
    """Find the separators ``config`` asks for; remembered per tokenizer and options.

    A policy other than ``"sepllm"`` has none.

    Raises:
        ConfigError: the tokenizer has none of them.
    """
    if config.policy != "sepllm":
        return Separators((), ())
    key = (config.separators, config.separator_match, config.separator_token_ids)
    found = _cache.setdefault(tokenizer, {})
    if key not in found:
        found[key] = _find(config, tokenizer)
    return found[key]


def _find(config: SepLLMConfig, tokenizer: Tokenizer) -> Separators:
    texts = token_texts(tokenizer)
    if config.separator_token_ids is not None:
        ids = config.separator_token_ids
        shown = tuple(texts[i] if i < len(texts) else f"<id {i}>" for i in ids)
        return Separators(ids, shown)
    ids = match_separators(texts, config.separators, config.separator_match)
    if not ids:
        raise ConfigError(
            f"no separator found in the tokenizer's {len(texts)} tokens: looked for "
            f"{list(config.separators)!r} with separator_match={config.separator_match!r}; "
            "set separators to texts this tokenizer has, or separator_token_ids"
        )
    return Separators(ids, tuple(texts[i] for i in ids))


def match_separators(
    texts: Sequence[str], separators: Sequence[str], match: str
) -> tuple[int, ...]:
    """Ids whose text is a separator.

    Args:
        texts: the text of every token id.
        separators: separator texts.
        match: ``"exact"`` takes tokens that are one separator (the paper's choice);
            ``"composed"`` also takes tokens made of nothing but separator characters,
            such as ``".\\n\\n"`` or ``" ,"``.
    """
    if match == "exact":
        wanted = frozenset(separators)
        return tuple(i for i, text in enumerate(texts) if text in wanted)
    characters = frozenset("".join(separators))
    return tuple(i for i, text in enumerate(texts) if text and characters.issuperset(text))


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text each token id adds behind another token."""
    cached = _texts_cache.get(tokenizer)
    if cached is None:
        cached = _texts_cache[tokenizer] = _decode_all(tokenizer)
    return cached


def _decode_all(tokenizer: Tokenizer) -> list[str]:
    anchor = tokenizer.encode(_ANCHOR_TEXT, add_special_tokens=False)[-1]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    prefix = len(tokenizer.decode([anchor], **options))
    pairs = [[anchor, token_id] for token_id in range(len(tokenizer))]
    batch_decode = getattr(tokenizer, "batch_decode", None)
    if batch_decode is not None:
        decoded: list[str] = batch_decode(pairs, **options)
    else:
        decoded = [tokenizer.decode(pair, **options) for pair in pairs]
    return [text[prefix:] for text in decoded]


def kept_share_of_english(policy: KeptPolicy, tokenizer: Tokenizer) -> float:
    """Share of tokens kept in a sample of English prose, sinks left out.

    An estimate for planning memory; every other number is counted on the actual text.
    """
    ids = tokenizer.encode(ENGLISH_SAMPLE, add_special_tokens=False)
    return float(policy.kept_flags(ids, first_position=policy.num_sink_tokens).mean())
