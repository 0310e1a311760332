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
# English words that often begin a sentence and are nobody's name: articles, pronouns, conjunctions,
# prepositions, auxiliaries, question words and adverbs of time and order.
_STARTERS = """
a an the this that these those such some any all both each every either neither no none one two
another other many much more most few little less least several
i you he she it we they me him her us them my your his its our their mine yours hers
who whom whose which what when where why how there here
and but or nor so yet for if then else while because since although though unless until as than
about above across after against along among around at before behind below beneath beside
between beyond by down during from in inside into near of off on onto out outside over past
through throughout to toward towards under up upon with within without
is was are were am be been being do does did have has had can could will would shall should may
might must not never ever always often now today again once still just only even also too very
perhaps maybe yes well oh ah let look see hear say said come go thus hence however therefore
indeed instead meanwhile moreover suddenly soon later first second next last finally
"""
SENTENCE_STARTERS = frozenset(_STARTERS.split())
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


def is_name(text: str) -> bool:
    """Capitalized, and no English word that often begins a sentence: " Alice", "NASA", "Lon". A
    name is often several tokens, of which the first is capitalized."""
    return is_capitalized(text) and text.strip().lower() not in SENTENCE_STARTERS


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
    "names": KeepClass("token that may begin a name", "tokens of names", has_text=is_name),
}
