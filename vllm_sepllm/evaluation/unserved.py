"""H2O and PoD on the same material. They are not served: Transformers runs them, one at a time.

What they hold is counted and not seen: pages with the keys and values that a cache of theirs would
have, as a share of the pages of the whole text. A peak is not counted, as a prompt is computed at
once here. PoD finds its blocks on the texts that it predicts afterwards, which is in its favour.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from vllm_sepllm.baselines.h2o import HeavyHitters, apply_h2o
from vllm_sepllm.baselines.pod import SharedKeys, apply_pod, make_blocks, similarities
from vllm_sepllm.evaluation.material import NEW_TOKENS, Question
from vllm_sepllm.evaluation.run import PAGE
from vllm_sepllm.evaluation.worker import DONE, distinct, join, read_material, run_job

Options = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A model that attends as some method does.

    Attributes:
        model: of Transformers.
        states: what its layers hold beside keys and values; the same object may be there twice.
        held: how many tokens' keys and values it holds, of a text with so many.
        after_prompt: it drops nothing before a prompt is computed, and then all that it drops.
    """

    model: Any
    states: Sequence[HeavyHitters | SharedKeys]
    held: Callable[[int], float]
    after_prompt: bool = False

    def begin(self, prompt: int) -> None:
        """A text begins, whose first tokens are a prompt."""
        if self.after_prompt:
            for state in self.states:
                assert isinstance(state, HeavyHitters)
                state.prompt = prompt


def apply(model: Any, options: Options, texts: Sequence[Sequence[int]]) -> Method:
    """Make a model attend so.

    Args:
        model: of Transformers.
        options: ``method`` and its arguments.
        texts: by which PoD finds its blocks.
    """
    if options["method"] == "h2o":
        heavy, recent = options["heavy"], options["recent"]
        states = apply_h2o(model, heavy, recent)
        after_prompt = options.get("after_prompt", False)
        return Method(model, states, lambda length: min(length, heavy + recent), after_prompt)
    near = options["num_sink_tokens"], options["recent"]
    state = apply_pod(model, make_blocks(similarities(model, texts)), *near)

    def held(length: int) -> float:
        distant = max(0, length - sum(near))
        return length - state.saved * distant

    return Method(model, [state], held)


def _forward(method: Method, ids: Sequence[int], cache: Any) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]``; the cache takes the tokens up."""
    tokens = torch.tensor([list(ids)], device=method.model.device)
    logits: torch.Tensor = method.model(tokens, past_key_values=cache, use_cache=True).logits[0]
    return logits.float()


def _held(method: Method, lengths: Sequence[int]) -> dict[str, float]:
    """Pages that requests hold, and those of their whole texts, of each in the mean."""
    held = sum(_pages(method.held(length)) for length in lengths)
    count = len(lengths)
    return {"requests": count, "pages": held / count, "of": sum(map(_pages, lengths)) / count}


def _pages(num_tokens: float) -> int:
    return math.ceil(num_tokens / PAGE)


@torch.inference_mode()
def score_texts(
    method: Method, texts: Sequence[Sequence[int]], done: Callable[[], None]
) -> dict[str, Any]:
    """As :func:`vllm_sepllm.evaluation.measure.score_texts`."""
    nats, likeliest = [], []
    for text in texts:
        half = len(text) // 2
        method.begin(half)
        logits = _forward(method, text, None)[half - 1 : -1]
        target = torch.tensor(text[half:], device=logits.device)
        nats.append(torch.nn.functional.cross_entropy(logits, target, reduction="none").tolist())
        likeliest.append(logits.argmax(-1).tolist())
        done()
    held = _held(method, [len(text) for text in texts])
    return {"nats": nats, "likeliest": likeliest, "held": held}


@torch.inference_mode()
def answer_questions(
    method: Method,
    tokenizer: Any,
    questions: Iterable[Question],
    done: Callable[[], None],
) -> dict[str, Any]:
    """As :func:`vllm_sepllm.evaluation.measure.answer_questions`; what the questions about a
    document have in common is computed once."""
    replies, lengths = [], []
    for _, asked in groupby(questions, key=lambda q: (q.setting, q.document)):
        prompts = [question.token_ids for question in asked]
        lengths.append(len(prompts[0]))
        shared = _shared(prompts)
        cache = _new_cache(method.model)
        method.begin(shared)
        _forward(method, prompts[0][:shared], cache)
        before = [copy.deepcopy(vars(state)) for state in method.states]
        for prompt in prompts:
            for state, values in zip(method.states, before, strict=True):
                vars(state).update(copy.deepcopy(values))
            ids = _greedy(method, prompt[shared:], copy.deepcopy(cache), tokenizer.eos_token_id)
            replies.append(tokenizer.decode(ids, skip_special_tokens=True))
            done()
    return {"replies": replies, "held": _held(method, lengths)}


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all begin with, and that none ends with."""
    least = min(map(len, prompts)) - 1
    same = (len({prompt[at] for prompt in prompts}) == 1 for at in range(least))
    return next((at for at, alike in enumerate(same) if not alike), least)


def _greedy(method: Method, ids: Sequence[int], cache: Any, end: int | None) -> list[int]:
    found: list[int] = []
    for _ in range(NEW_TOKENS):
        token = int(_forward(method, ids, cache)[-1].argmax())
        if token == end:
            break
        found.append(token)
        ids = [token]
    return found


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a method; the result is that of :func:`vllm_sepllm.evaluation.worker.run`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    material = read_material(json.loads(Path(job["material"]).read_text(encoding="utf8")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=job["engine"]["dtype"], trust_remote_code=False
    )
    model = loaded.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    replies: dict[int, str] = {}
    held = []
    result: dict[str, Any] = {}

    def done() -> None:
        print(DONE, flush=True)

    for options in distinct([job["of_texts"], *job["of_groups"].values()]):
        method = apply(model, options, material.texts)
        groups = {group for group, of in job["of_groups"].items() if of == options}
        chosen = {i: q for i, q in enumerate(material.questions) if q.group in groups}
        if options == job["of_texts"]:
            result["texts"] = score_texts(method, material.texts, done)
        if chosen:
            found = answer_questions(method, tokenizer, chosen.values(), done)
            replies |= dict(zip(chosen, found["replies"], strict=True))
            held.append(found["held"])
    return {"key": job["key"], **result, "questions": join(replies, held)}


if __name__ == "__main__":
    run_job(run)
