"""The text that each token of a tokenizer adds to a text.

Nothing is asked of a tokenizer but what vLLM's own protocol of tokenizers promises, and of that
only ``decode`` must work. A token is read *in context*: decoded behind another token, the anchor,
and cut from there. Decoded on their own, SentencePiece tokens lose the leading space that tells
``" ,"`` from ``","``. Three habits of tokenizers need more than that:

- The decoder puts a space between tokens, as that of WordPiece does. Such a space is not in the
  vocabulary's own piece, and is dropped.
- ``decode`` takes spaces before marks away ("clean-up"), which makes ``" ."`` a ``"."``. It is
  told not to, where it can be told.
- A token is a part of a character. Its text then is "�" and no separator. A byte that is a whole
  character, such as ``<0x0A>``, has the text of that character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
MAX_TOKEN_IDS = 2**22  # the largest vocabularies have 2**18
_MOST_TRIALS = 256  # anchors tried before one that is good enough is taken


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of vLLM and of Hugging Face have it."""

    def __len__(self) -> int: ...

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Text of token ids."""


# With the tokenizer's length then: a chat template may add tokens to it.
_sizes_cache: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
_texts_cache: WeakKeyDictionary[Any, tuple[int, list[str]]] = WeakKeyDictionary()


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of every token id, ``[num_token_ids(tokenizer)]``; remembered per tokenizer.

    An id that stands for nothing, or that cannot be decoded, has the text "".

    Raises:
        ValueError: it has an id so large that most of those below stand for nothing.
        Exception: what the tokenizer raises, if it can decode no token at all.
    """
    return _remembered(_texts_cache, tokenizer, _all_texts)


def _all_texts(tokenizer: Tokenizer) -> list[str]:
    size = num_token_ids(tokenizer)
    if size > MAX_TOKEN_IDS:
        raise ValueError(f"it has the id {size - 1}, and must have none above {MAX_TOKEN_IDS}")
    return texts_of(tokenizer, range(size))


def _remembered(
    cache: WeakKeyDictionary[Any, tuple[int, T]],
    tokenizer: Tokenizer,
    find: Callable[[Tokenizer], T],
) -> T:
    """What was found for a tokenizer when it had as many tokens as now, or is found now."""
    length = len(tokenizer)
    with suppress(TypeError):  # a tokenizer that cannot be a key is read anew
        known = cache.get(tokenizer)
        if known is not None and known[0] == length:
            return known[1]
    found = find(tokenizer)
    with suppress(TypeError):
        cache[tokenizer] = length, found
    return found


def texts_of(tokenizer: Tokenizer, token_ids: Iterable[int]) -> list[str]:
    """The texts of some token ids, in their order; see :func:`token_texts`."""
    reader, ids = _Reader(tokenizer), list(token_ids)
    with suppress(Exception):  # one that cannot be decoded spoils them all
        return reader.texts_at_once(ids)
    texts: list[str] = []
    failure: Exception | None = None
    for token_id in ids:
        try:
            texts.append(reader.text(token_id))
        except Exception as error:  # a gap in the vocabulary: what is raised differs
            failure = error
            texts.append("")
    if failure is not None and not any(texts):
        raise failure
    return texts


def num_token_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest token id; more than ``len`` where a vocabulary has gaps. Remembered
    per tokenizer."""
    return _remembered(_sizes_cache, tokenizer, _count_ids)


def _count_ids(tokenizer: Tokenizer) -> int:
    largest = [len(tokenizer) - 1]
    with suppress(Exception):  # both are optional
        largest.append(int(tokenizer.max_token_id))  # type: ignore[attr-defined]
    with suppress(Exception):
        largest.append(max(tokenizer.get_vocab().values()))  # type: ignore[attr-defined]
    return max(largest) + 1


class _Reader:
    """Reads tokens of one tokenizer behind an anchor."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, bool] = {"clean_up_tokenization_spaces": False}
        anchor, self._adds_spaces = self._find_anchor()
        self._anchor = [] if anchor is None else [anchor]
        self._prefix = "" if anchor is None else self._decode([anchor])

    def text(self, token_id: int) -> str:
        """What the token adds behind the anchor.

        Raises:
            Exception: what the tokenizer raises.
        """
        return self._cut(token_id, self._decode([*self._anchor, token_id]))

    def texts_at_once(self, token_ids: list[int]) -> list[str]:
        """:meth:`text` of each, several times as fast where a tokenizer has ``batch_decode``.

        Raises:
            Exception: what the tokenizer raises, or that it has no ``batch_decode``.
        """
        pairs = [[*self._anchor, token_id] for token_id in token_ids]
        decode = self._tokenizer.batch_decode
        decoded = decode(pairs, skip_special_tokens=False, **self._options)
        return [self._cut(*each) for each in zip(token_ids, decoded, strict=True)]

    def _cut(self, token_id: int, both: str) -> str:
        """The token's part of what it and the anchor are decoded to."""
        if not both.startswith(self._prefix):  # a part of a character can spoil its neighbour
            return self._decode([token_id])
        text = both[len(self._prefix) :]
        if self._adds_spaces and text.startswith(" ") and self._piece(token_id) == text[1:]:
            return text[1:]  # the decoder's space, not the token's
        return text

    def _decode(self, token_ids: list[int]) -> str:
        if self._options:
            try:
                return self._decode_with(token_ids)
            except Exception:
                # Another tokenizer than Hugging Face's, or an id that stands for nothing.
                kept, self._options = self._options, {}
                try:
                    return self._decode_with(token_ids)
                except Exception:
                    self._options = kept
                    raise
        return self._decode_with(token_ids)

    def _decode_with(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, **self._options)
        return text

    def _piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; ``None`` if the tokenizer does not say."""
        with suppress(Exception):
            piece: str = self._tokenizer.convert_ids_to_tokens([token_id])[0]
            return piece
        return None

    def _find_anchor(self) -> tuple[int | None, bool]:
        """A token of letters or digits whose text others follow at once.

        Failing that one that a space follows, failing that any whose text stays when another
        follows; ``None`` if there is none. Second, whether a space follows it.
        """
        best, trials = None, 0
        for wanted in (str.isalnum, _is_plain):
            for token_id in self._candidates(wanted):
                is_joined = self._is_joined(token_id)
                if is_joined and wanted is str.isalnum:  # marks are also joined by clean-up
                    return token_id, False
                if is_joined is not None:
                    best = token_id if best is None else best
                trials += 1
                if best is not None and trials >= _MOST_TRIALS:
                    break
            if best is not None:
                return best, True
        return None, False

    def _candidates(self, wanted: Any) -> Iterator[int]:
        special: set[int] = set()
        with suppress(Exception):
            special.update(self._tokenizer.all_special_ids)
        for token_id in range(num_token_ids(self._tokenizer)):
            if token_id in special:
                continue
            with suppress(Exception):
                if wanted(self._decode([token_id])):
                    piece = self._piece(token_id)
                    if piece is None or not _BYTE_PIECE.fullmatch(piece):
                        yield token_id

    def _is_joined(self, token_id: int) -> bool | None:
        """Whether it is followed at once; ``None`` if its text changes when it is followed."""
        with suppress(Exception):
            alone, twice = self._decode([token_id]), self._decode([token_id, token_id])
            if twice == 2 * alone:
                return True
            if twice.startswith(alone) and twice.endswith(alone):
                return False
        return None


def _is_plain(text: str) -> bool:
    return bool(text) and text.isprintable() and text == text.strip() and "�" not in text
