"""Options that hold a given share of the KV cache, and a search for the best among them.

A rule says which tokens stay behind the window. For each rule the window is made as wide as the
share allows, so candidates differ in what they spend it on. They are then measured by successive
halving (Jamieson and Talwalkar, arXiv 1502.07943): all on little text, the better half on more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.share import Counted, rule_of
from vllm_sepllm.keep_classes import special_ids
from vllm_sepllm.layers import LayerPlan
from vllm_sepllm.separators import Tokenizer

CLASSES = {
    "digits": ["digits"],
    "digits and capitals": ["digits", "capitalized"],
    "digits and names": ["digits", "names"],
}
BEHIND = 0, 2, 4  # tokens kept behind each of them
BOUNDS = 256, 64  # newest tokens kept


def _make_rules() -> dict[str, dict[str, Any]]:
    """All combinations, and what stands outside of them."""
    found: dict[str, dict[str, Any]] = {
        "nothing (StreamingLLM)": {"policy": "streaming"},
        "separators": {},
        "facts": {"preset": "facts"},
    }
    for first in ([], ["separators"]):
        for name, classes in CLASSES.items():
            for number in BEHIND:
                options: dict[str, Any] = {"keep": [*first, "special", *classes]}
                if number:
                    options["keep_after"] = dict.fromkeys(classes, number)
                behind = f", {number} behind each" if number else ""
                found[f"{', '.join([*first, name])}{behind}"] = options
    return found


RULES = _make_rules()


def rules_for(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """:data:`RULES`, without special tokens if a tokenizer has none."""
    if special_ids(tokenizer):
        return RULES
    return {
        name: {**of, "keep": [x for x in of["keep"] if x != "special"]} if "keep" in of else of
        for name, of in RULES.items()
    }


FINEST = 16  # tokens: windows are multiples of it


@dataclass(frozen=True)
class Candidate:
    """Options to be measured.

    Attributes:
        name: the rule, its window, bound and dense layers.
        options: of SepLLM; ``None`` is full attention.
        share: of the KV cache, mean over texts and layers.
        rule: its name.
    """

    name: str
    options: dict[str, Any] | None = field(hash=False)
    share: float
    rule: str = ""


class Shares:
    """The share of the KV cache that a rule holds, by its window."""

    def __init__(
        self, options: dict[str, Any], tokenizer: Tokenizer, texts: Sequence[Sequence[int]]
    ) -> None:
        rule = rule_of(SepLLMConfig.from_dict(options), tokenizer)
        self._texts = [Counted(rule, [text]) for text in texts]

    def of(self, window: int) -> float:
        """Mean over texts of the share of tokens that the last one attends to."""
        found = [counted.at_end(window) / counted.lengths[0] for counted in self._texts]
        return sum(found) / len(found)

    def widest(self, share: float) -> int | None:
        """The widest window that holds no more than a share; ``None`` if the narrowest does."""
        longest = max(counted.lengths[0] for counted in self._texts)
        low, high = 0, longest // FINEST
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.of(middle * FINEST) <= share else (low, middle - 1)
        return low * FINEST or None


def candidates(
    rules: dict[str, dict[str, Any]],
    dense: Iterable[tuple[int, ...]],
    share: float,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[int]],
    num_layers: int,
    bounds: Sequence[int | None] = (None,),
) -> list[Candidate]:
    """Options that hold at most a share, each with the widest window that it can have.

    Args:
        rules: options by name, without a bound of their own.
        dense: layers with full attention, each tried with every rule.
        share: of the KV cache, over all layers.
        tokenizer: finds the tokens that are kept.
        texts: like those to be served, token ids.
        num_layers: of the model.
        bounds: newest tokens kept; ``None`` is all.
    """
    found = []
    choices = list(dense)
    for name, options in rules.items():
        for bound in bounds:
            if bound and options.get("policy") == "streaming":
                continue
            bounded = options if bound is None else {**options, "max_separator_tokens": bound}
            shares = Shares(bounded, tokenizer, texts)
            for layers in choices:
                part = len(LayerPlan.of(layers, num_layers).dense) / num_layers
                if part >= share:
                    continue
                window = shares.widest((share - part) / (1 - part))
                if window is None:
                    continue
                of_all = part + (1 - part) * shares.of(window)
                more = [f"newest {bound}"] if bound else []
                more += [f"layers {', '.join(map(str, layers))} dense"] if layers else []
                shown = "; ".join([f"{name}, window {window}", *more])
                given = {**bounded, "window_size": window}
                if layers:
                    given["dense_layers"] = list(layers)
                found.append(Candidate(shown, given, of_all, name))
    return _distinct(found, shares_bound=0.005)


def _distinct(found: list[Candidate], shares_bound: float) -> list[Candidate]:
    """Without bounds that change nothing: their window and share are those of the rule without."""
    kept: list[Candidate] = []
    for one in found:
        plain = {k: v for k, v in (one.options or {}).items() if k != "max_separator_tokens"}
        same = any(
            plain == other.options and abs(one.share - other.share) < shares_bound for other in kept
        )
        if not same:
            kept.append(one)
    return kept


@dataclass(frozen=True)
class Score:
    """What was measured of a candidate.

    Attributes:
        nats: per token, of the second halves of texts.
        right: questions answered.
        of: questions asked.
    """

    nats: float
    right: int = 0
    of: int = 0

    @property
    def perplexity(self) -> float:
        """Of the same tokens."""
        return math.exp(self.nats)

    def order(self, by_questions: bool) -> tuple[float, float]:
        """Smaller is better."""
        return (-self.right / self.of if by_questions and self.of else 0.0, self.nats)


@dataclass(frozen=True)
class Rung:
    """How much is measured: numbers of texts and of documents."""

    texts: tuple[int, ...]
    documents: tuple[int, ...] = ()


Measure = Callable[[Candidate, Rung], Score | None]


def halve(
    found: Sequence[Candidate], rungs: Sequence[Rung], measure: Measure, by_questions: bool
) -> list[tuple[Candidate, Score]]:
    """The better half of a rung goes on to the next.

    Args:
        found: at least one.
        rungs: ever more.
        measure: of a candidate; ``None`` if there was no time, or it cannot be served.
        by_questions: questions come first, and likelihood decides between equals.

    Returns:
        Those of the last rung that was measured, the best first.
    """
    left, best = list(found), []
    for number, rung in enumerate(rungs):
        scored = [(one, score) for one in left if (score := measure(one, rung)) is not None]
        if not scored:
            break
        best = sorted(scored, key=lambda pair: pair[1].order(by_questions))
        if number + 1 < len(rungs):
            left = [one for one, _ in best[: max(2, math.ceil(len(best) / 2))]]
    return best
