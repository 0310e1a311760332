"""What is compared: SepLLM with several options, each beside StreamingLLM with as much KV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.material import Material
from vllm_sepllm.evaluation.share import mean_attended, streaming_like
from vllm_sepllm.kept_ids import resolve_kept

Options = dict[str, Any] | None
FULL, SEPLLM, FACTS, YOURS = "full attention", "SepLLM", "facts", "your options"
EQUAL = "StreamingLLM, KV of "
RANDOM = "random ids for separators"
ALIKE = 0.02  # windows that differ by less than this share are the same


@dataclass(frozen=True)
class Way:
    """A way of attending.

    Attributes:
        name: in tables.
        of_texts: SepLLM's options while texts are predicted; ``None`` is full attention.
        of_questions: while questions are answered: these differ for StreamingLLM, whose window
            follows what is to be equalled.
        equal: name of the way that gives StreamingLLM as much KV.
        is_control: it shows whether the evaluation sees what it should.
    """

    name: str
    of_texts: Options
    of_questions: Options
    equal: str | None = None
    is_control: bool = False

    def ideal(self, material: Material, tokenizer: Any, num_layers: int) -> dict[str, float]:
        """Share of tokens that the last of a text, and of a question, attends to."""
        shares = {}
        for task, options, ids in (
            ("texts", self.of_texts, list(material.texts)),
            ("questions", self.of_questions, material.documents),
        ):
            config = None if options is None else SepLLMConfig.from_dict(options)
            attended = mean_attended(config, tokenizer, ids, num_layers)
            shares[task] = attended / mean_attended(None, tokenizer, ids, num_layers)
        return shares


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


def make_ways(
    options: dict[str, dict[str, Any]], material: Material, tokenizer: Any, num_layers: int
) -> list[Way]:
    """Full attention, the ways of some options, StreamingLLM with as much KV, and the controls.

    A token of every few in the place of separators (FixLLM), and ids drawn at random, are added
    where SepLLM is among the options: all three then hold as much.

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
        ids = _random_ids(material, share)
        if ids:
            wanted[RANDOM] = {"keep": ids, "window_size": window}
            controls.add(RANDOM)
    ways = [Way(FULL, None, None)]
    streaming: list[Way] = []
    for name, of_way in wanted.items():
        config = SepLLMConfig.from_dict(of_way)
        pair = tuple(
            streaming_like(config, mean_attended(config, tokenizer, ids, num_layers)).window_size
            for ids in (material.texts, material.documents)
        )
        if config.policy == "streaming" and not config.dense_layers:
            equal = None  # it is its own
        else:
            sinks, mode = config.num_sink_tokens, config.position_mode
            equal = _equal(streaming, pair, sinks, mode, name)
        ways.append(Way(name, of_way, of_way, equal, name in controls))
    return [*ways, *streaming]


def _equal(streaming: list[Way], windows: Sequence[int], sinks: int, mode: str, name: str) -> str:
    """The name of StreamingLLM with such windows, which is added if none is there yet."""
    options: list[dict[str, Any]] = [
        {
            "policy": "streaming",
            "num_sink_tokens": sinks,
            "window_size": window,
            "position_mode": mode,
        }
        for window in windows
    ]
    for way in streaming:
        there: list[Any] = [way.of_texts, way.of_questions]
        near = all(
            {**a, "window_size": 0} == {**b, "window_size": 0}
            and abs(a["window_size"] - b["window_size"]) <= ALIKE * b["window_size"]
            for a, b in zip(there, options, strict=True)
        )
        if near:
            return way.name
    streaming.append(Way(f"{EQUAL}{name}", options[0], options[1]))
    return streaming[-1].name


def _all_ids(material: Material) -> Iterable[int]:
    return chain.from_iterable([*material.texts, *material.documents])


def _kept_share(config: SepLLMConfig, material: Material, tokenizer: Any) -> float:
    """Share of all tokens that are of ``keep``."""
    kept = set(resolve_kept(config, tokenizer).token_ids)
    ids = list(_all_ids(material))
    return sum(token in kept for token in ids) / len(ids)


def _random_ids(material: Material, share: float) -> list[int]:
    """Ids drawn at random that make up a share of all tokens, a little less at most."""
    counts = Counter(_all_ids(material))
    drawn = np.random.default_rng(0).permutation(sorted(counts)).tolist()
    left, found = share * counts.total(), []
    for token in drawn:
        if counts[token] <= left:
            found.append(token)
            left -= counts[token]
    return sorted(found)
