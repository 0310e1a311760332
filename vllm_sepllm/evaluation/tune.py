"""Finds options for a share of the KV cache: first which tokens to keep, then which layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_sepllm.evaluation.material import Suite
from vllm_sepllm.evaluation.run import Evaluation
from vllm_sepllm.evaluation.search import (
    BOUNDS,
    RULES,
    Candidate,
    Rung,
    Score,
    candidates,
    halve,
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
        calibrated: what became of calibrated lists, a sentence; ``None`` without them.
    """

    best: list[tuple[Candidate, Score]]
    reported: list[tuple[Candidate, Score]]
    layers: list[tuple[int, float]]
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
        ValueError: no rule leaves a window within such a share, or there was no time.
    """
    material, num_layers = evaluation.material, evaluation.model.num_layers
    texts = [*material.texts, *material.documents]
    rungs = RUNGS if by_questions else tuple(replace(rung, documents=()) for rung in RUNGS)
    rules = {**possible(RULES, tokenizer)[0], **(calibrated or {})}

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
        raise ValueError(f"no rule leaves a window within {share:.0%} of the KV cache: allow more")
    best = halve(found, rungs, measure, by_questions)
    layers: list[tuple[int, float]] = []
    if best:
        first = {one.rule: rules[one.rule] for one, _ in best[:2]}
        more = fitting(first, bounds=BOUNDS)
        if num_layers >= FEWEST_LAYERS:
            layers = rank_layers(best[0][0], num_layers, measure, rungs[0])
        if len(layers) == num_layers:
            more += fitting(first, dense=_choices(layers))
        scored = [(one, score) for one in more if (score := measure(one, rungs[-1])) is not None]
        best = sorted([*best, *scored], key=lambda pair: pair[1].order(by_questions))
    if not best:
        raise ValueError("nothing was measured within the time: give more --minutes")
    plain = [one for one, _ in best if not one.rule.startswith(CALIBRATED)]
    shown = [Candidate(FULL, None, 1.0), *(one for one, _ in best[:2]), *plain[:2]]
    shown += [one for one in found if one.rule == STREAMING]
    reported = {
        one: score for one in dict.fromkeys(shown) if (score := searcher.report(one, REPORTED))
    }
    said = None
    if calibrated:
        said, wins = _judge(best, reported, by_questions)
        if not wins:
            best = [(one, score) for one, score in best if one in plain]
    return Tuned(best, list(reported.items()), layers, said)


def _judge(
    best: Sequence[tuple[Candidate, Score]], reported: dict[Candidate, Score], by_questions: bool
) -> tuple[str, bool]:
    """Whether calibrated lists win on text that they and the search did not see."""
    of_kind: dict[bool, list[Candidate]] = {True: [], False: []}
    for one, _ in best:
        if one in reported:
            of_kind[one.rule.startswith(CALIBRATED)].append(one)
    if not of_kind[True]:
        return "No calibrated list came near the best of the search.", False
    if not of_kind[False]:
        return "Nothing but calibrated lists was measured to the end.", True
    mine, other = (reported[of_kind[kind][0]].order(by_questions) for kind in (True, False))
    if mine < other:
        return "A calibrated list is the best on text that it was not made from.", True
    return "Calibrated lists win nothing on text that they were not made from: left out.", False


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
