"""What an evaluation found: figures, tables and what they mean, as JSON and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_sepllm.evaluation.facts import is_right
from vllm_sepllm.evaluation.material import CHAT, DOCUMENT, Question
from vllm_sepllm.evaluation.statistics import Difference, Pairs, nats_difference
from vllm_sepllm.evaluation.ways import FULL, RANDOM, SEPLLM, Way

Result = dict[str, Any]


def marks(questions: Sequence[Question], replies: Sequence[str]) -> list[bool]:
    """Whether each question was answered rightly."""
    return [is_right(r, q.answer) for r, q in zip(replies, questions, strict=True)]


@dataclass(frozen=True)
class Figures:
    """Of one way.

    Attributes:
        way: which.
        perplexity: of the second halves of all texts.
        agreement: share of tokens there at which the likeliest token is full attention's.
        right: by question.
        held: share of the bytes that full attention holds for the same requests: ``texts`` and
            ``questions``, each ``mean`` over the steps of a request and ``peak``, which is ``None``
            for what is not served.
        ideal: share of tokens attended to, where ``texts`` are predicted and by the end of
            ``questions``.
    """

    way: Way
    perplexity: float
    agreement: float
    right: list[bool]
    held: dict[str, dict[str, float | None]]
    ideal: dict[str, float]
    result: Result

    @property
    def shown(self) -> str:
        """Its name, marked if vLLM does not serve it."""
        return self.way.name if self.way.is_served else f"{self.way.name} (not served)"

    def of_setting(self, questions: Sequence[Question], setting: str) -> list[bool]:
        """Those of documents or of conversations."""
        return [r for r, q in zip(self.right, questions, strict=True) if q.setting == setting]


def figures(
    way: Way,
    result: Result,
    full: Result,
    questions: Sequence[Question],
    ideal: dict[str, float],
) -> Figures:
    """What the result of a way comes to, beside that of full attention."""
    nats = [value for text in result["texts"]["nats"] for value in text]
    pairs = [
        (a, b)
        for mine, other in zip(
            result["texts"]["likeliest"], full["texts"]["likeliest"], strict=True
        )
        for a, b in zip(mine, other, strict=True)
    ]
    held = {
        task: _held(result[task]["held"], full[task]["held"]) for task in ("texts", "questions")
    }
    right = marks(questions, result["questions"]["replies"])
    same = sum(a == b for a, b in pairs) / len(pairs)
    return Figures(way, math.exp(sum(nats) / len(nats)), same, right, held, ideal, result)


def _held(mine: dict[str, float], full: dict[str, float]) -> dict[str, float | None]:
    if "pages" in mine:  # not served
        return {"mean": mine["pages"] / mine["of"], "peak": None}
    return {kind: mine[kind] / full[kind] for kind in ("mean", "peak")}


def controls(
    found: dict[str, Figures], questions: Sequence[Question], without: Sequence[Question]
) -> list[tuple[str, bool, str]]:
    """Name, whether the measurement sees what it should, and a sentence, of each control."""
    full = found[FULL]
    right = full.of_setting(questions, DOCUMENT)
    guessed = marks(without, full.result["without"]["replies"])
    pairs = Pairs.of(right, guessed)
    sees = pairs.is_clear and pairs.first > pairs.second
    text = (
        f"Full attention answers {sum(right)} of {len(right)} questions about documents, and "
        f"{sum(guessed)} when the facts are taken out of them."
    )
    if not sees:
        text += " So right answers say nothing here."
    rows = [("facts taken out", sees, text)]
    if RANDOM in found and SEPLLM in found:
        change = nats_difference(*(found[n].result["texts"]["nats"] for n in (RANDOM, SEPLLM)))
        sees = change.is_clear and change.mean > 0
        text = (
            "As many random ids in the place of separators: "
            f"{change.mean:+.4f} nats per token (standard error {change.error:.4f})."
        )
        if not sees:
            text += " So separators are not shown to be better than any other tokens here."
    elif SEPLLM in found:
        sees, text = False, "Not measured: it failed, or the texts have no such ids."
    else:
        sees, text = True, "Not run, as SepLLM is not among the ways."
    return [*rows, ("random ids for separators", sees, text)]


def compared(found: dict[str, Figures], name: str) -> tuple[Difference, Pairs] | None:
    """A way beside StreamingLLM with as much KV."""
    mine = found[name]
    if mine.way.equal is None or mine.way.equal not in found:
        return None
    other = found[mine.way.equal]
    nats = nats_difference(mine.result["texts"]["nats"], other.result["texts"]["nats"])
    return nats, Pairs.of(mine.right, other.right)


def sentence(found: dict[str, Figures], name: str) -> str | None:
    """What a way wins and loses beside StreamingLLM with as much KV."""
    both = compared(found, name)
    if both is None:
        return None
    nats, pairs = both
    mine, other = found[name], found[str(found[name].way.equal)]
    better = "better" if nats.mean < 0 else "worse"
    text = f"{better} at predicting text" if nats.is_clear else "no difference shown in predicting"
    text += f" ({mine.perplexity:.2f} and {other.perplexity:.2f}, {nats.mean:+.4f} nats per token, "
    text += f"standard error {nats.error:.4f})"
    more = "more" if pairs.first > pairs.second else "fewer"
    facts = f"{more} questions answered" if pairs.is_clear else "no difference shown in answers"
    facts += f" ({sum(mine.right)} and {sum(other.right)} of {len(mine.right)}, "
    facts += f"chance {pairs.chance:.2f})"
    shares = [one.held["questions"]["mean"] or 0 for one in (mine, other)]
    kv = f"{shares[0]:.0%} and {shares[1]:.0%} of full attention's KV for questions"
    return f"**{mine.shown}**: {text}; {facts}; {kv}."


def as_json(found: dict[str, Figures], questions: Sequence[Question]) -> dict[str, Any]:
    """Figures of every way, without the long lists they come from."""
    shown = {}
    for name, one in found.items():
        both = compared(found, name)
        shown[name] = {
            "served": one.way.is_served,
            "options": {
                "texts": _short(one.way.of_texts),
                **{group: _short(of) for group, of in one.way.of_groups.items()},
            },
            "perplexity": one.perplexity,
            "agreement": one.agreement,
            "right": {
                setting: [sum(marked), len(marked)]
                for setting in (DOCUMENT, CHAT)
                if (marked := one.of_setting(questions, setting))
            },
            "grid": grid(one, questions),
            "held": one.held,
            "ideal": one.ideal,
            "equal": one.way.equal,
            "beside_equal": None if both is None else [asdict(part) for part in both],
        }
    return shown


def _short(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Options without long lists of ids."""
    if options is None or len(options.get("keep", ())) < 50:
        return options
    return {**options, "keep": f"{len(options['keep'])} ids"}


def grid(one: Figures, questions: Sequence[Question]) -> dict[str, dict[int, list[int]]]:
    """Right answers and questions, by group and, in it, by distance from the document's end."""
    rows: dict[str, dict[int, list[int]]] = {}
    for question, right in zip(questions, one.right, strict=True):
        cell = rows.setdefault(question.group, {}).setdefault(question.distance, [0, 0])
        cell[0] += right
        cell[1] += 1
    return {group: dict(sorted(row.items())) for group, row in rows.items()}
