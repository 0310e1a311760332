"""Classes of tokens that the option ``keep`` can name.

A class looks at the text of a token (:mod:`vllm_sepllm.token_texts`) or asks the tokenizer. Its
tokens stay wherever they stand, so it needs nothing of the engine. To add one is to add it here,
and to the tests: see CONTRIBUTING.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

SEPARATORS = "separators"
LISTED = "listed"  # not to be named: texts and ids that ``keep`` holds one by one
BEHIND = "behind"  # nor this: tokens that stay for what stands before them (``keep_after``)


@dataclass(frozen=True)
class KeepClass:
    """A class of tokens.

    Attributes:
        one: what people call one of its tokens.
        many: and several of them.
        has_text: whether a token's text makes it one of them.
        ids: from a tokenizer, their ids, where texts do not tell; sorted.
    """

    one: str
    many: str
    has_text: Callable[[str], bool] | None = None
    ids: Callable[[Any], tuple[int, ...]] | None = None


def has_digits(text: str) -> bool:
    """At least one decimal digit (Unicode Nd) and no letter (L): "7", " 2019", "3.", "$5"."""
    categories = [unicodedata.category(char) for char in text]
    return "Nd" in categories and not any(each[0] == "L" for each in categories)


def is_capitalized(text: str) -> bool:
    """The first character that is no white space is an uppercase or titlecase letter (Unicode Lu,
    Lt): " Alice", "NASA", "I"."""
    return unicodedata.category(text.lstrip()[:1] or " ") in ("Lu", "Lt")


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids the tokenizer calls special, and those it only adds to its vocabulary as special, as
    chat markers often are."""
    found: set[int] = set()
    with suppress(Exception):  # both are optional
        found.update(tokenizer.all_special_ids)
    with suppress(Exception):
        added = tokenizer.added_tokens_decoder
        found.update(token_id for token_id, token in added.items() if token.special)
    return tuple(sorted(found))


KEEP_CLASSES = {
    # Found by the options separators, separator_match and separator_token_ids.
    SEPARATORS: KeepClass("separator", "separators"),
    "special": KeepClass("special token, as chat markers are,", "special tokens", ids=special_ids),
    "digits": KeepClass("token of digits", "tokens of digits", has_text=has_digits),
    "capitalized": KeepClass(
        "token with a capital letter first", "capitalized tokens", has_text=is_capitalized
    ),
}
