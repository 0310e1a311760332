"""What one engine makes of the material: scores, answers, and the memory it holds meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, takewhile
from typing import Any

from vllm_sepllm.engine.in_process import bytes_held, output_lengths, run_together
from vllm_sepllm.evaluation.material import NEW_TOKENS, Question


class Held:
    """Bytes of the KV cache that requests held, looked at after every step of an engine.

    Pages behind the window of a prompt's last part go back in the step after it. So the mean counts
    steps from the second new token on, and requests must run for three.
    """

    def __init__(self) -> None:
        self._decoding: dict[str, list[int]] = defaultdict(list)
        self._peaks: dict[str, int] = defaultdict(int)

    def look(self, llm: Any) -> None:
        """After a step."""
        outputs = output_lengths(llm)
        for name, held in bytes_held(llm).items():
            self._peaks[name] = max(self._peaks[name], held)
            if outputs[name] > 1:
                self._decoding[name].append(held)

    def summary(self) -> dict[str, float]:
        """Of how many requests, and means over them: of what each held in the mean of its steps,
        and at most.

        Raises:
            RuntimeError: a request was too short to be seen.
        """
        if self._decoding.keys() != self._peaks.keys():
            raise RuntimeError("a request was not seen while it decoded: it needs three new tokens")
        count = max(1, len(self._peaks))
        means = sum(sum(held) / len(held) for held in self._decoding.values())
        peaks = sum(self._peaks.values())
        return {"requests": len(self._peaks), "mean": means / count, "peak": peaks / count}


def score_texts(
    llm: Any, texts: Sequence[Sequence[int]], done: Callable[[], None]
) -> dict[str, Any]:
    """Of the second half of each text: every token's negative log-likelihood, and the likeliest.

    Args:
        llm: a proxy of a vLLM ``LLM``.
        texts: token ids.
        done: called after each text.

    Returns:
        ``nats`` and ``likeliest``, a list for each text, and ``held`` (:meth:`Held.summary`).
    """
    held, nats, likeliest = Held(), [], []
    for number, text in enumerate(texts):
        prompt = {f"text {number}": text}
        [output] = run_together(llm, prompt, held.look, max_tokens=3, prompt_logprobs=1)
        half = len(text) // 2
        entries = list(zip(output.prompt_logprobs[half:], text[half:], strict=True))
        nats.append([-entry[token].logprob for entry, token in entries])
        likeliest.append([_first(entry) for entry, _ in entries])
        done()
    return {"nats": nats, "likeliest": likeliest, "held": held.summary()}


def _first(entry: dict[int, Any]) -> int:
    """The likeliest token; the smallest id where several are as likely."""
    best = max(found.logprob for found in entry.values())
    return min(token for token, found in entry.items() if found.logprob == best)


def answer_questions(
    llm: Any, questions: Iterable[Question], done: Callable[[], None]
) -> dict[str, Any]:
    """The beginning of a greedy answer to each question.

    The first question about a document is asked alone, and what is held is looked at then. The
    others are asked together; they find the document in the prefix cache, and share its pages. A
    reply ends where the model ends it.

    Args:
        llm: a proxy of a vLLM ``LLM``.
        questions: those about one document are neighbours.
        done: called after each question.

    Returns:
        ``replies``, and ``held`` (:meth:`Held.summary`).
    """
    held, replies, number = Held(), [], 0
    tokenizer = llm.get_tokenizer()
    for _, asked in groupby(questions, key=lambda q: (q.setting, q.document)):
        first, *others = (question.token_ids for question in asked)
        for batch, look in (([first], held.look), (others, _look_away)):
            named = {f"question {number + i}": ids for i, ids in enumerate(batch)}
            number += len(batch)
            for output in run_together(llm, named, look, max_tokens=NEW_TOKENS):
                ids = takewhile(lambda i: i != tokenizer.eos_token_id, output.outputs[0].token_ids)
                replies.append(tokenizer.decode(list(ids), skip_special_tokens=True))
                done()
    return {"replies": replies, "held": held.summary()}


def _look_away(llm: Any) -> None:
    pass
