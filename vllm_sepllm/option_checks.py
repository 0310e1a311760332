"""Values of options: what they may be, and the one sentence that says so where they are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_sepllm.keep_classes import KEEP_CLASSES
from vllm_sepllm.presets import PRESETS
from vllm_sepllm.spans import LONGEST_SPAN

MAX_TEXTS = 1000  # of an option; each is looked for among all tokens
MAX_TOKENS = 2**31 - 1  # positions are int32 in vLLM's block tables and in ours


class ConfigError(ValueError):
    """An option cannot be used; the message names value, limit and remedy."""


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few values.

    Raises:
        ConfigError: it is another.
    """
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: object, least: int, remedy: str) -> None:
    """A whole number of tokens, at least ``least``.

    Raises:
        ConfigError: it is not; ``remedy`` ends the sentence.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r}: must be a whole number of tokens; {remedy}")
    if value < least:
        raise ConfigError(f"{name}={value}: must be at least {least}; {remedy}")
    if value > MAX_TOKENS:
        raise ConfigError(f"{name}={value}: must be at most {MAX_TOKENS}; {remedy}")


def check_few_texts(name: str, items: Iterable[object]) -> None:
    """Not so many texts that looking for them takes long.

    Raises:
        ConfigError: there are more.
    """
    count = sum(isinstance(item, str) for item in items)
    if count > MAX_TEXTS:
        raise ConfigError(
            f"{name} holds {count} texts: must be at most {MAX_TEXTS}; give token ids for others"
        )


def checked_keep(name: str, value: object) -> tuple[str | int, ...]:
    """Classes, texts and ids, each once.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, str) and value in PRESETS:
        raise ConfigError(f"{name}={value!r}: this is a preset; set preset={value!r} instead")
    if not isinstance(value, (list, tuple)):
        raise ConfigError(
            f"{name}={value!r}: must be a list of {', '.join(KEEP_CLASSES)}, texts and token ids, "
            'e.g. ["separators", "digits"]'
        )
    for item in value:
        is_id = isinstance(item, int) and not isinstance(item, bool) and item >= 0
        if not is_id and not (isinstance(item, str) and item):
            raise ConfigError(
                f"{name} holds {item!r}: every item must be one of {', '.join(KEEP_CLASSES)}, the "
                "text of a token, or a token id of at least 0"
            )
    check_few_texts(name, value)
    return tuple(dict.fromkeys(value))


def plain(value: Any) -> Any:
    """Lists in the place of tuples."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def only_ids(items: tuple[str | int, ...]) -> tuple[int, ...]:
    """Items that are ids, all of them.

    Raises:
        ValueError: a tokenizer has to tell some.
    """
    ids = tuple(item for item in items if isinstance(item, int))
    if len(ids) < len(items):
        raise ValueError("keep_after is not resolved: call resolve_kept first")
    return ids


def checked_keep_after(
    value: object, keep: tuple[str | int, ...]
) -> tuple[tuple[int, tuple[str | int, ...]], ...]:
    """Any of the forms of ``keep_after`` as pairs, largest numbers first, without those of 0."""
    if isinstance(value, Mapping):
        pairs = [(number, (item,)) for item, number in value.items()]
    elif isinstance(value, (list, tuple)) and all(_is_pair(each) for each in value):
        pairs = [(number, tuple(items)) for number, items in value]
    else:
        pairs = [(value, keep)]  # type: ignore[list-item]  # checked below
        if value and not keep:
            raise ConfigError(
                f"keep_after={value!r} with keep=[]: no token is kept that could keep others; add "
                "to keep, or drop keep_after"
            )
    found: dict[int, dict[str | int, None]] = {}
    known = set(keep)
    for number, items in pairs:
        _check_span(number)
        for item in items:
            if not _is_item(item) or item not in known:
                raise ConfigError(f"keep_after holds {item!r}, which is not in keep: {_way(item)}")
            found.setdefault(number, {})[item] = None
    return tuple((number, tuple(found[number])) for number in sorted(found, reverse=True) if number)


def _is_item(value: object) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _way(item: object) -> str:
    """What to do about an item of ``keep_after`` that is not in ``keep``."""
    if isinstance(item, str) and item.isdecimal():
        return f"for a token id write pairs, e.g. keep_after=[[4, [{item}]]]"
    return "add it there, or leave it out"


def _is_pair(value: object) -> bool:
    """Whether it is a number with its items."""
    return (
        isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], (list, tuple))
    )


def _check_span(value: object) -> None:
    remedy = 'e.g. keep_after=4, or {"digits": 2, "capitalized": 4} for items of keep'
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"keep_after={value!r}: must be a number of tokens, {remedy}")
    if not 0 <= value <= LONGEST_SPAN:
        raise ConfigError(f"keep_after={value}: must be from 0 to {LONGEST_SPAN} tokens, {remedy}")


def checked_segment_ends(value: object) -> tuple[str | int, ...]:
    """Texts and ids, each once.

    Raises:
        ConfigError: it is something else.
    """
    good = isinstance(value, (list, tuple)) and all(
        (isinstance(item, int) and not isinstance(item, bool) and item >= 0)
        or (isinstance(item, str) and item)
        for item in value
    )
    if not good:
        raise ConfigError(
            f"segment_ends={value!r}: must be a list of texts and token ids, e.g. "
            '[".", "?", "!", ";", "\\n"]; an empty one ends no segment'
        )
    check_few_texts("segment_ends", value)  # type: ignore[arg-type]
    return tuple(dict.fromkeys(value))  # type: ignore[call-overload]


def checked_texts(name: str, value: object) -> tuple[str, ...]:
    """At least one text, none of them empty.

    Raises:
        ConfigError: it is something else.
    """
    good = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
    if not good or not value:
        raise ConfigError(
            f"{name}={value!r}: must be a non-empty list of non-empty texts and names of lists, "
            'e.g. [".", ","] or ["default", "cjk"]'
        )
    check_few_texts(name, value)  # type: ignore[arg-type]
    return tuple(value)  # type: ignore[arg-type]


def checked_token_ids(name: str, value: object) -> tuple[int, ...]:
    """Ids, sorted, each once.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name}={value!r}: must be a list of token ids, e.g. [13, 11]")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ConfigError(
                f"{name} holds {item!r}: every token id must be a whole number of at least 0"
            )
    return tuple(sorted(set(value)))


def checked_layers(name: str, value: object) -> tuple[int, ...]:
    """Indices of layers; negative ones count from the last.

    Raises:
        ConfigError: it is something else.
    """
    good = isinstance(value, (list, tuple)) and all(
        isinstance(item, int) and not isinstance(item, bool) for item in value
    )
    if not good:
        raise ConfigError(
            f"{name}={value!r}: must be a list of layer indices, e.g. [0, 1, -2, -1] for the first "
            "two and the last two"
        )
    return tuple(value)  # type: ignore[arg-type]
