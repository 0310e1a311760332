"""Finds options for a share of the KV cache: first which tokens to keep, then which layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vllm_sepllm.evaluation.material import Suite
from vllm_sepllm.evaluation.run import Evaluation
from vllm_sepllm.evaluation.search import (
    RULES,
    Candidate,
    Rung,
    Score,
    candidates,
    halve,
)
from vllm_sepllm.evaluation.searcher import Searcher
from vllm_sepllm.evaluation.ways import FULL

# The first half is searched on, the second is what the result is reported for.
SUITE = Suite(num_texts=8, text_length=1024, lengths=(800,), num_documents=10, num_chats=0)
RUNGS = Rung((0,), (0,)), Rung((0, 1), (0, 1, 2)), Rung((0, 1, 2, 3), (0, 1, 2, 3, 4))
REPORTED = Rung((4, 5, 6, 7), (5, 6, 7, 8, 9))
FEWEST_LAYERS = 4  # of a model whose layers are ranked
STREAMING = "nothing (StreamingLLM)"


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        best: the best first, each with its score on what was searched on.
        reported: scores on what was not: of full attention, the first two, and StreamingLLM with as
            much KV.
        layers: layers by what each loses alone, in nats per token, the costliest first.
    """

    best: list[tuple[Candidate, Score]]
    reported: list[tuple[Candidate, Score]]
    layers: list[tuple[int, float]]


def tune(
    evaluation: Evaluation,
    searcher: Searcher,
    tokenizer: Any,
    share: float,
    by_questions: bool,
    say: Callable[[str], None],
) -> Tuned:
    """Search, and report on text that the search did not see.

    Args:
        evaluation: of :data:`SUITE`.
        searcher: measures; it knows when the time is over.
        tokenizer: finds the tokens that are kept.
        share: of the KV cache.
        by_questions: questions come first.
        say: called with what is done now.

    Raises:
        ValueError: no rule leaves a window within such a share, or there was no time.
    """
    material, num_layers = evaluation.material, evaluation.model.num_layers
    texts = [*material.texts, *material.documents]
    rungs = RUNGS if by_questions else tuple(replace(rung, documents=()) for rung in RUNGS)
    found = candidates(RULES, [()], share, tokenizer, texts, num_layers)
    if not found:
        raise ValueError(f"no rule leaves a window within {share:.0%} of the KV cache: allow more")

    def measure(one: Candidate, rung: Rung) -> Score | None:
        say(f"{one.name} ({len(rung.texts)} texts, {len(rung.documents)} documents)")
        return searcher.score(one, rung)

    best = halve(found, rungs, measure, by_questions)
    layers: list[tuple[int, float]] = []
    if best and num_layers >= FEWEST_LAYERS and not searcher.is_late:
        layers = rank_layers(best[0][0], num_layers, measure, rungs[0])
        rules = {one.name: _undense(one.options) for one, _ in best[:2]}
        more = candidates(rules, _choices(layers), share, tokenizer, texts, num_layers)
        scored = [(one, score) for one in more if (score := measure(one, rungs[-1])) is not None]
        best = sorted([*best, *scored], key=lambda pair: pair[1].order(by_questions))
    if not best:
        raise ValueError("nothing was measured within the time: give more --minutes")
    equal = [one for one in found if one.options == {**RULES[STREAMING], **_window(one)}]
    shown = [Candidate(FULL, None, 1.0), *(one for one, _ in best[:2])]
    shown += [one for one in equal if one not in shown]
    reported = [(one, score) for one in shown if (score := searcher.report(one, REPORTED))]
    return Tuned(best, reported, layers)


def _window(one: Candidate) -> dict[str, Any]:
    return {"window_size": (one.options or {}).get("window_size")}


def _undense(options: dict[str, Any] | None) -> dict[str, Any]:
    left = ("window_size", "dense_layers")
    return {name: value for name, value in (options or {}).items() if name not in left}


def rank_layers(
    one: Candidate,
    num_layers: int,
    measure: Callable[[Candidate, Rung], Score | None],
    rung: Rung,
) -> list[tuple[int, float]]:
    """What each layer loses if it alone attends sparsely: nats per token, the costliest first.

    Args:
        one: what it attends to.
        num_layers: of the model.
        measure: of a candidate.
        rung: its texts.
    """
    only_texts = Rung(rung.texts)
    full = measure(Candidate(FULL, None, 1.0), only_texts)
    found = []
    for layer in range(num_layers):
        others = [index for index in range(num_layers) if index != layer]
        options = {**(one.options or {}), "dense_layers": others}
        score = measure(Candidate(f"layer {layer} alone", options, 1.0), only_texts)
        if full is not None and score is not None:
            found.append((layer, score.nats - full.nats))
    return sorted(found, key=lambda pair: -pair[1])


def _choices(layers: list[tuple[int, float]]) -> list[tuple[int, ...]]:
    """Dense layers to try: one, two, four of the costliest."""
    ranked = [layer for layer, _ in layers]
    counts = [count for count in (1, 2, 4) if count < len(ranked)]
    return [tuple(sorted(ranked[:count])) for count in counts]
