"""Finds options for a share of the KV cache: first which tokens to keep, then which layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_sepllm.evaluation.material import Suite
from vllm_sepllm.evaluation.run import Evaluation
from vllm_sepllm.evaluation.search import (
    BOUNDS,
    Candidate,
    Rung,
    Score,
    candidates,
    halve,
    rules_for,
)
from vllm_sepllm.evaluation.searcher import Searcher
from vllm_sepllm.evaluation.ways import FULL, possible

# Of one part of the text, and as much again of another, on which the result is reported.
SUITE = Suite(num_texts=4, text_length=1024, lengths=(800,), num_documents=5, num_chats=0)
RUNGS = Rung((0,), (0,)), Rung((0, 1), (0, 1, 2)), Rung((0, 1, 2, 3), (0, 1, 2, 3, 4))
REPORTED = Rung((4, 5, 6, 7), (5, 6, 7, 8, 9))
FEWEST_LAYERS = 4  # of a model whose layers are ranked
STREAMING = "nothing (StreamingLLM)"
CALIBRATED = "calibrated"  # how names of rules begin that were found on text


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        best: the best first, each with its score on what was searched on.
        reported: scores on what was not: of full attention, the first two, and StreamingLLM with as
            much KV.
        layers: layers by what each loses alone, in nats per token, the costliest first.
        refused: rules that this tokenizer lacks the tokens for, and why.
        calibrated: what became of calibrated lists, a sentence; ``None`` without them.
    """

    best: list[tuple[Candidate, Score]]
    reported: list[tuple[Candidate, Score]]
    layers: list[tuple[int, float]]
    refused: dict[str, str]
    calibrated: str | None = None


def tune(
    evaluation: Evaluation,
    searcher: Searcher,
    tokenizer: Any,
    share: float,
    by_questions: bool,
    say: Callable[[str], None],
    calibrated: dict[str, dict[str, Any]] | None = None,
) -> Tuned:
    """Search, and report on text that the search did not see.

    Args:
        evaluation: of :data:`SUITE`, twice.
        searcher: measures; it knows when the time is over.
        tokenizer: finds the tokens that are kept.
        share: of the KV cache.
        by_questions: questions come first.
        say: called with what is done now.
        calibrated: rules beside :data:`RULES`, of other text; names begin with ``CALIBRATED``.

    Raises:
        ValueError: no rule leaves a window within such a share, none could be served, or there was
            no time.
    """
    material, num_layers = evaluation.material, evaluation.model.num_layers
    texts = [*material.texts, *material.documents]
    rungs = RUNGS if by_questions else tuple(replace(rung, documents=()) for rung in RUNGS)
    usable, refused = possible(rules_for(tokenizer), tokenizer)
    rules = {**usable, **(calibrated or {})}

    def fitting(
        rules: dict[str, dict[str, Any]],
        dense: Sequence[tuple[int, ...]] = ((),),
        bounds: Sequence[int | None] = (None,),
    ) -> list[Candidate]:
        return candidates(rules, dense, share, tokenizer, texts, num_layers, bounds)

    def measure(one: Candidate, rung: Rung) -> Score | None:
        say(f"{one.name} ({len(rung.texts)} texts, {len(rung.documents)} documents)")
        return searcher.score(one, rung)

    found = fitting(rules)
    if not found:
        raise ValueError(
            f"no rule leaves a window within {100 * share:.3g}% of the KV cache: allow more"
        )
    best = halve(found, rungs, measure, by_questions)
    if not best and searcher.failed:
        raise ValueError(f"no rule could be served: {next(iter(searcher.failed.values()))}")
    if not best:
        raise ValueError("nothing was measured within the time: give more --minutes")
    first = {one.rule: rules[one.rule] for one, _ in best[:2]}
    more = [one for one in fitting(first, bounds=(None, *BOUNDS)) if one not in found]
    layers = rank_layers(best[0][0], num_layers, measure, rungs[0])
    if len(layers) == num_layers:
        more += fitting(first, dense=_choices(layers))
    scored = [(one, score) for one in more if (score := measure(one, rungs[-1])) is not None]
    best = sorted([*best, *scored], key=lambda pair: pair[1].order(by_questions))
    # Lists are of other text than this search, so here they win or lose like any other rule.
    wins = best[0][0].rule.startswith(CALIBRATED)
    plain = [pair for pair in best if not pair[0].rule.startswith(CALIBRATED)]
    best = best if wins else plain
    said = None
    if calibrated:
        said = "A calibrated list is the best" if wins else "No calibrated list is the best"
        said += ", on text that the lists were not made from."
    shown = [one for one, _ in [*best[:2], *plain[:1]]]
    shown += [one for one in found if one.rule == STREAMING]
    reasons = {name: str(error) for name, error in refused.items()}
    return Tuned(best, _report(shown, searcher), layers, reasons, said)


def _report(shown: Sequence[Candidate], searcher: Searcher) -> list[tuple[Candidate, Score]]:
    """Full attention and others, on text that the search did not see."""
    ways = dict.fromkeys([Candidate(FULL, None, 1.0), *shown])
    scores = [(one, searcher.report(one, REPORTED)) for one in ways]
    return [(one, score) for one, score in scores if score is not None]


def rank_layers(
    one: Candidate,
    num_layers: int,
    measure: Callable[[Candidate, Rung], Score | None],
    rung: Rung,
) -> list[tuple[int, float]]:
    """What each layer loses if it alone attends sparsely: nats per token, the costliest first.

    Args:
        one: what it attends to.
        num_layers: of the model. With fewer than ``FEWEST_LAYERS`` none is ranked.
        measure: of a candidate.
        rung: its texts.
    """
    if num_layers < FEWEST_LAYERS:
        return []
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
