"""What ``vllm-sepllm inspect`` calls things, for each policy."""

from __future__ import annotations

import json
import shlex

from vllm_sepllm.cli.inspection import Inspection, TokenClass, kind_of_class
from vllm_sepllm.cli.inspection_advice import keeps_next_to_nothing
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.keep_classes import BEHIND, KEEP_CLASSES, LISTED, SEPARATORS, KeepClass
from vllm_sepllm.planning import NEXT_TO_NOTHING

_LISTED = KeepClass("token that keep lists", "listed tokens")


def class_words(name: str) -> KeepClass:
    """What a class of ``keep`` is called."""
    return KEEP_CLASSES.get(name, _LISTED)


def keep_names(config: SepLLMConfig) -> list[str]:
    """Classes that the option ``keep`` names, ``LISTED`` among them, each once."""
    if not config.method.uses_keep:
        return []
    return list(dict.fromkeys(str(x) if x in KEEP_CLASSES else LISTED for x in config.keep))


def labels(config: SepLLMConfig) -> dict[str, str]:
    """What each kind of token is called; one that there never is is left out."""
    chosen: dict[str, str] = {TokenClass.CHOSEN: config.method.chosen}
    if config.method.uses_keep:
        names = keep_names(config)
        chosen = {kind_of_class(name): name for name in names}
        if SEPARATORS in names:
            chosen[TokenClass.CHOSEN] = config.method.chosen
    if config.keep_after:
        chosen[BEHIND] = BEHIND
    found = {TokenClass.SINK: "sink", **chosen, TokenClass.WINDOW: "window"}
    found[TokenClass.DROPPED] = "dropped"
    return {kind: label for kind, label in found.items() if label}


def legend(config: SepLLMConfig) -> dict[str, str]:
    """What each of :func:`labels` means."""
    meanings: dict[str, str] = {name: class_words(name).one for name in keep_names(config)}
    meanings[TokenClass.CHOSEN] = config.method.meaning(config)
    if config.keep_after:
        meanings[BEHIND] = f"at most {_tokens(config.keep_after[0][0])} behind such a token and"
    meanings = {k: f"{what} outside the window, seen all the same" for k, what in meanings.items()}
    meanings[TokenClass.SINK] = "one of the first tokens, always seen"
    meanings[TokenClass.WINDOW] = "the last token and those just before it"
    meanings[TokenClass.DROPPED] = "not seen any more, its KV cache is freed"
    return {kind: meanings[kind] for kind in labels(config)}


def _tokens(number: int) -> str:
    return f"{number} token" if number == 1 else f"{number:,} tokens"


def _items(items: tuple[str | int, ...]) -> str:
    """Items of ``keep`` for people: classes and texts by name, ids by their number."""
    names = [
        item if item in KEEP_CLASSES else repr(item) for item in items if isinstance(item, str)
    ]
    ids = sum(isinstance(item, int) for item in items)
    return " and ".join([*names, *([f"{ids:,} id{'s' * (ids > 1)}"] if ids else [])])


def describe(inspection: Inspection) -> str:
    """The options in one line."""
    config = inspection.config
    parts = [f"{config.num_sink_tokens:,} sinks", f"window of {config.window_size:,}"]
    if config.method.uses_keep:
        for name, ids in inspection.found.by_class.items():
            parts.append(f"{len(ids):,} {class_words(name).many} in the vocabulary")
        parts += [
            f"{_tokens(number)} behind {_items(items)}" for number, items in config.keep_after
        ]
        if config.max_separator_tokens is not None:
            parts.append(f"the {config.max_separator_tokens:,} newest of a text seen")
    if config.interval is not None:
        parts.append(f"one token of every {config.interval:,}")
    if config.position_mode != "original":
        parts.append(f"positions of the {config.position_mode}")
    if config.dense_layers:
        parts.append(f"all tokens in layers {list(config.dense_layers)}, not shown here")
    return f"{config.method.title}: {', '.join(parts)}"


def summary_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """The summary as ``(what, value)`` texts."""
    config, summary = inspection.config, inspection.summary
    method = config.method
    rows = [("tokens", f"{summary.num_tokens:,}")]
    names = keep_names(config)
    many: dict[str, str] = {name: f"{class_words(name).many} outside the window" for name in names}
    many[BEHIND] = "tokens behind them outside the window"
    many |= {TokenClass.SINK: "sinks", TokenClass.CHOSEN: f"{method.many} outside the window"}
    rows += [(many.get(k, label), f"{summary.num_of[k]:,}") for k, label in labels(config).items()]
    rows.append(("seen by the last token", f"{summary.num_seen / summary.num_tokens:.1%}"))
    if config.position_mode == "cache":
        rows.append(("cache position of the last token", f"{summary.num_seen - 1:,}"))
    pages = summary.kept_pages + summary.window_pages
    return [
        *rows,
        (
            f"pages of {summary.block_size} tokens, {method.title}",
            f"{pages:,} ({summary.kept_pages:,} kept + {summary.window_pages:,} window)",
        ),
        (f"pages of {summary.block_size} tokens, full attention", f"{summary.full_pages:,}"),
    ]


def notices(inspection: Inspection) -> list[str]:
    """What a person should know before believing the picture, one sentence each."""
    config, summary = inspection.config, inspection.summary
    found = []
    if summary.num_tokens <= config.window_size:
        found.append(
            f"window_size={config.window_size} covers all {summary.num_tokens} tokens, so nothing "
            f"is dropped: try a longer text or -o window_size={max(1, summary.num_tokens // 4)}"
        )
    found += _missing(inspection)
    if keeps_next_to_nothing(config, summary.num_chosen_between, summary.num_between):
        found.append(
            f"only {summary.num_chosen_between:,} of the {summary.num_between:,} tokens between "
            f"sinks and window are separators (under {NEXT_TO_NOTHING:.0%}), so this is "
            f"StreamingLLM in effect: {_remedy(inspection)}"
        )
    return found


def _missing(inspection: Inspection) -> list[str]:
    """That separators asked for are no tokens; the paper's nine suit every language a little."""
    named = {name: texts for name, texts in inspection.missing.items() if name != "default"}
    found = inspection.found
    own = [repr(text) for text in (*named.pop("", ()), *found.missing, *found.missing_ends)]
    lists = [f"{len(texts)} texts of {name!r}" for name, texts in named.items()]
    if not own and not lists:
        return []
    return [
        f"not among this tokenizer's tokens: {', '.join([*own, *lists])}; nothing is kept for "
        "them, so leave them out, or set token ids"
    ]


def _remedy(inspection: Inspection) -> str:
    better = inspection.better
    if better is None:
        return (
            "no list of separators helps, as the text has no such marks or the tokenizer no tokens "
            "for them; -o policy=fixed_interval -o interval=8 keeps one token of every 8"
        )
    drop = "" if inspection.config.separator_token_ids is None else "drop separator_token_ids, and "
    names = shlex.quote(f"separators={json.dumps(better.separators, ensure_ascii=False)}")
    match = "" if better.match == "exact" else f" -o separator_match={better.match}"
    return f"{drop}-o {names}{match} keeps {better.share:.1%} of them"
