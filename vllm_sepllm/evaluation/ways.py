"""What is compared: SepLLM with several options, each beside StreamingLLM with as much KV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.evaluation.material import Material
from vllm_sepllm.evaluation.share import equal_window, mean_attended
from vllm_sepllm.kept_ids import resolve_kept

Options = dict[str, Any] | None
FULL, SEPLLM, FACTS, YOURS = "full attention", "SepLLM", "facts", "your options"
EQUAL = "StreamingLLM, KV of "
RANDOM = "random ids for separators"
H2O, POD = "H2O", "PoD"  # not served
H2O_WHOLE = "H2O, the document in full"
ALL = 2**20  # tokens: a window that nothing leaves
ALIKE = 0.02  # windows that differ by less than this share are the same


@dataclass(frozen=True)
class Way:
    """A way of attending.

    Attributes:
        name: in tables.
        of_texts: SepLLM's options while texts are predicted; ``None`` is full attention.
        of_groups: while questions of a group are answered. They differ for StreamingLLM, whose
            window follows what is to be equalled.
        equal: name of the way that gives StreamingLLM as much KV.
        is_control: it shows whether the evaluation sees what it should.
        is_served: by vLLM; else its options are those of :mod:`vllm_sepllm.evaluation.unserved`.
    """

    name: str
    of_texts: Options
    of_groups: dict[str, Options] = field(hash=False)
    equal: str | None = None
    is_control: bool = False
    is_served: bool = True

    def ideal(self, material: Material, tokenizer: Any, num_layers: int) -> dict[str, float]:
        """Share of tokens attended to: where texts are predicted, and by the end of questions."""

        def share(options: Options, ids: Sequence[Sequence[int]], over_half: bool) -> float:
            config = None if options is None else SepLLMConfig.from_dict(_like(options))
            mine, all_of_it = (
                mean_attended(of, tokenizer, ids, num_layers, over_half) for of in (config, None)
            )
            return mine / all_of_it

        groups = material.groups
        shares = [share(self.of_groups[name], ids, False) for name, ids in groups.items()]
        sizes = [sum(map(len, ids)) for ids in groups.values()]
        weighted = sum(a * b for a, b in zip(shares, sizes, strict=True)) / sum(sizes)
        return {"texts": share(self.of_texts, material.texts, True), "questions": weighted}


def served(options: Options) -> Options:
    """What an engine is given: all options, so that none is filled in by a rule that the model
    carries."""
    return None if options is None else SepLLMConfig.from_dict(options).to_dict()


def _like(options: dict[str, Any]) -> dict[str, Any]:
    """Options of SepLLM with which as many tokens are attended to."""
    if options.get("method") == "h2o":
        total = options["heavy"] + options["recent"]
        return {"policy": "streaming", "num_sink_tokens": 0, "window_size": total}
    if options.get("method") == "pod":
        return {"policy": "streaming", "window_size": ALL}  # distant keys are attended to as well
    return options


def usual_options(window: int, with_more: bool) -> dict[str, dict[str, Any]]:
    """Options by name.

    Args:
        window: of all of them.
        with_more: of the full suite.
    """
    classes = ["special", "digits", "capitalized"]
    found: dict[str, dict[str, Any]] = {
        SEPLLM: {},
        "SepLLM, newest 64 separators": {"max_separator_tokens": 64},
        "SepLLM, first and last layer dense": {"dense_layers": [0, -1]},
        "digits and capitals": {"keep": classes},
        FACTS: {"preset": FACTS},
    }
    if with_more:
        found |= {
            "SepLLM and facts": {"preset": FACTS, "keep": ["separators", "names", *classes]},
            "digits and capitals, 4 behind each": {
                "keep": classes,
                "keep_after": dict.fromkeys(classes[1:], 4),
            },
            "SepLLM, a quarter of the window": {"window_size": max(1, window // 4)},
            "SepLLM, twice the window": {"window_size": 2 * window},
        }
    return {name: {"window_size": window, **options} for name, options in found.items()}


def possible(
    options: dict[str, dict[str, Any]], tokenizer: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, ConfigError]]:
    """Those whose tokens a tokenizer has, and why each of the others cannot be used."""
    found, refused = {}, {}
    for name, of_way in options.items():
        try:
            resolve_kept(SepLLMConfig.from_dict(of_way), tokenizer)
        except ConfigError as error:
            refused[name] = error
        else:
            found[name] = of_way
    return found, refused


def make_ways(
    options: dict[str, dict[str, Any]], material: Material, tokenizer: Any, num_layers: int
) -> list[Way]:
    """Full attention, the ways of some options, StreamingLLM with as much KV, and the controls.

    One token of every few in the place of separators (FixLLM), and ids drawn at random, are added
    where SepLLM is among the options. Both keep about as many tokens.

    Args:
        options: by name.
        material: sizes are made equal for its texts and documents.
        tokenizer: finds the tokens that are kept.
        num_layers: of the model.

    Raises:
        ConfigError: options are wrong for this model.
    """
    wanted, controls = dict(options), set()
    if SEPLLM in options:
        window = options[SEPLLM]["window_size"]
        share = _kept_share(SepLLMConfig.from_dict(options[SEPLLM]), material, tokenizer)
        fixed = {"policy": "fixed_interval", "interval": max(1, round(1 / max(share, 1e-3)))}
        wanted["one token of a few"] = {**fixed, "window_size": window}
        ids = _random_ids(material, share, _not_drawn(tokenizer))
        if ids:
            wanted[RANDOM] = {"keep": ids, "window_size": window}
            controls.add(RANDOM)
    groups = material.groups
    ways, streaming = [Way(FULL, None, dict.fromkeys(groups))], list[Way]()
    for name, of_way in wanted.items():
        config = SepLLMConfig.from_dict(of_way)
        equal = None
        if config.policy != "streaming" or config.dense_layers:
            windows = [equal_window(config, tokenizer, material.texts, num_layers, over_half=True)]
            windows += [equal_window(config, tokenizer, ids, num_layers) for ids in groups.values()]
            of_texts, *others = (_streaming_options(config, window) for window in windows)
            of_groups: dict[str, Options] = dict(zip(groups, others, strict=True))
            equal = _equal(streaming, of_texts, of_groups, name)
        ways.append(Way(name, of_way, dict.fromkeys(groups, of_way), equal, name in controls))
    return [*ways, *streaming]


def unserved_ways(wanted: Collection[str], ways: Sequence[Way], window: int) -> list[Way]:
    """H2O with as much KV as some ways, half of it for recent tokens, and PoD, untrained.

    H2O is there twice. It holds as much KV as the others at any time; or the whole document, or
    half of a text, first, and what comes behind that sees what is left, as with kvpress's methods.

    Args:
        wanted: of both names.
        ways: that are served.
        window: recent tokens of PoD.
    """
    by_name = {way.name: way for way in ways}
    found = []
    for name in (SEPLLM, FACTS) if H2O in wanted else ():
        equal = by_name[name].equal if name in by_name else None
        if equal in by_name:
            like = by_name[equal]
            for title, more in ((H2O, {}), (H2O_WHOLE, {"after_prompt": True})):
                groups: dict[str, Options] = {
                    group: _h2o(options) | more for group, options in like.of_groups.items()
                }
                texts = _h2o(like.of_texts) | more
                found.append(Way(f"{title}, KV of {name}", texts, groups, equal, is_served=False))
    if POD in wanted:
        pod = {"method": "pod", "num_sink_tokens": 16, "recent": window}
        always: dict[str, Options] = dict.fromkeys(ways[0].of_groups, pod)
        found.append(Way(f"{POD}, untrained", pod, always, is_served=False))
    return found


def _h2o(streaming: Options) -> dict[str, Any]:
    """A budget as large as sinks and window."""
    assert streaming is not None
    total = streaming["num_sink_tokens"] + streaming["window_size"]
    return {"method": "h2o", "heavy": total // 2, "recent": total - total // 2}


def _streaming_options(config: SepLLMConfig, window: int) -> dict[str, Any]:
    return {
        "policy": "streaming",
        "num_sink_tokens": config.num_sink_tokens,
        "window_size": window,
        "position_mode": config.position_mode,
    }


def _equal(
    streaming: list[Way], of_texts: dict[str, Any], of_groups: dict[str, Options], name: str
) -> str:
    """The name of StreamingLLM with such windows, which is added if none is there yet."""

    def near(a: Any, b: Any) -> bool:
        same = {**a, "window_size": 0} == {**b, "window_size": 0}
        return same and abs(a["window_size"] - b["window_size"]) <= ALIKE * b["window_size"]

    for way in streaming:
        others = [way.of_texts, *way.of_groups.values()]
        if all(map(near, others, [of_texts, *of_groups.values()])):
            return way.name
    streaming.append(Way(f"{EQUAL}{name}", of_texts, of_groups))
    return streaming[-1].name


def _all_ids(material: Material) -> Iterable[int]:
    return chain.from_iterable([*material.texts, *material.documents])


def _kept_share(config: SepLLMConfig, material: Material, tokenizer: Any) -> float:
    """Share of all tokens that are of ``keep``."""
    kept = set(resolve_kept(config, tokenizer).token_ids)
    ids = list(_all_ids(material))
    return sum(token in kept for token in ids) / len(ids)


def _not_drawn(tokenizer: Any) -> set[int]:
    """Separators, and what the tokenizer calls special."""
    separators = resolve_kept(SepLLMConfig(), tokenizer).token_ids
    return {*separators, *tokenizer.all_special_ids}


def _random_ids(material: Material, share: float, without: set[int]) -> list[int]:
    """Ids drawn at random that make up a share of all tokens, a little less at most."""
    counts = Counter(_all_ids(material))
    drawn = np.random.default_rng(0).permutation(sorted(counts.keys() - without)).tolist()
    left, found = share * counts.total(), []
    for token in drawn:
        if counts[token] <= left:
            found.append(token)
            left -= counts[token]
    return sorted(found)
