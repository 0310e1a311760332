"""Methods of kvpress on the material of an evaluation; ``peers.py`` starts it in its environment.

A method computes a prompt with full attention, then drops keys and values by layer and head, and
goes on with the rest. So these answers are what a short answer to a long prompt costs; the whole
prompt was held before.

* Questions: the document is cut down before the question is seen, as SepLLM has it too. "question
  seen" is the same with the question in the prompt.
* Texts: all but the last tokens is cut down; they are predicted, and all stay.

Left out: PyramidKV, whose layers hold different numbers of tokens, so that Transformers' mask
does not fit a question of several tokens behind them; LagKV, which always keeps some 250 tokens.
"""

from __future__ import annotations

import copy
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

NEW_TOKENS = 8
PRESSES = {
    "StreamingLLM": kvpress.StreamingLLMPress,
    "SnapKV": kvpress.SnapKVPress,
    "TOVA": kvpress.TOVAPress,
    "Knorm": kvpress.KnormPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "ObservedAttention": kvpress.ObservedAttentionPress,
    "Random": kvpress.RandomPress,
}
SEEN = "SnapKV", "question seen"  # the method its authors describe
EAGER = "ObservedAttention"  # needs the probabilities themselves


def compressed(model: Any, press: Any, ids: list[int]) -> tuple[DynamicCache, torch.Tensor]:
    """The cache of a prompt of which the method has dropped a part, and the last logits."""
    cache = DynamicCache()
    with press(model):
        logits = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits
    return cache, logits[0, -1]


def forward(model: Any, cache: Any, ids: list[int], at: int) -> torch.Tensor:
    """Logits of tokens that stand at positions from ``at`` on."""
    places = torch.arange(at, at + len(ids))[None]
    logits: torch.Tensor = model(
        torch.tensor([ids]), past_key_values=cache, position_ids=places
    ).logits
    return logits[0]


def nats(
    model: Any, press: Any, text: list[int], num_predicted: int, num_kept: float
) -> list[float]:
    """Of the last tokens."""
    before = len(text) - num_predicted
    press.compression_ratio = max(0.0, 1 - num_kept / before)
    cache, last = compressed(model, press, text[:before])
    logits = torch.cat([last[None], forward(model, cache, text[before:], before)[:-1]])
    target = torch.tensor(text[before:])
    return torch.nn.functional.cross_entropy(logits, target, reduction="none").tolist()


def answer(model: Any, cache: Any, last: torch.Tensor, length: int, end: int) -> list[int]:
    """Greedy, of a cache that holds a prompt of so many tokens."""
    found: list[int] = []
    while len(found) < NEW_TOKENS:
        token = int(last.argmax())
        if token == end:
            break
        found.append(token)
        last = forward(model, cache, [token], length + len(found) - 1)[-1]
    return found


def shared(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with."""
    least = min(map(len, prompts)) - 1
    return next((at for at in range(least) if len({p[at] for p in prompts}) > 1), least)


def replies(
    model: Any, press: Any, prompts: list[list[int]], num_kept: float, end: int, sees: bool
) -> list[list[int]]:
    """Answers to questions about one document, by a cache that holds so many tokens in the end.

    The first token of an answer comes after keys were dropped, too.
    """
    before = shared(prompts)
    found = []
    if not sees:  # all of the question stays
        left = max(1.0, num_kept - (len(prompts[0]) - before))
        press.compression_ratio = max(0.0, 1 - left / before)
        document, _ = compressed(model, press, prompts[0][:before])
    for prompt in prompts:
        if sees:  # the last token alone comes behind: its logits are those of what is left
            press.compression_ratio = max(0.0, 1 - (num_kept - 1) / (len(prompt) - 1))
            cache, _ = compressed(model, press, prompt[:-1])
            last = forward(model, cache, prompt[-1:], len(prompt) - 1)[-1]
        else:
            cache = copy.deepcopy(document)
            last = forward(model, cache, prompt[before:], before)[-1]
        found.append(answer(model, cache, last, len(prompt), end))
    return found


@torch.inference_mode()
def main() -> None:
    """Run the job of a file; a line is printed for each method."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf8"))
    material = json.loads(Path(job["material"]).read_text(encoding="utf8"))
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    end = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    file = Path(job["result"])
    found = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
    names = [(name, "") for name in PRESSES] + [SEEN]
    for budget, kept in job["budgets"].items():
        for name, how in names:
            shown = f"{name}{', ' * bool(how)}{how}, KV of {budget}"
            if shown in found:
                continue
            model.set_attn_implementation("eager" if name == EAGER else "sdpa")
            torch.manual_seed(0)  # of "Random"
            texts = [
                nats(model, PRESSES[name](), text, job["predicted"], kept["texts"])
                for text in material["texts"]
            ]
            said = []
            for (setting, _), asked in groupby(
                material["questions"], key=lambda q: (q["setting"], q["document"])
            ):
                questions = list(asked)
                prompts = [list(q["token_ids"]) for q in questions]
                num_kept = kept[f"{setting} {questions[0]['length']}"]
                said += replies(model, PRESSES[name](), prompts, num_kept, end, bool(how))
            decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
            found[shown] = {"nats": texts, "replies": decoded, "budget": budget}
            partial = file.with_suffix(".new")
            partial.write_text(json.dumps(found), encoding="utf8")
            partial.replace(file)
            print(shown, flush=True)


if __name__ == "__main__":
    main()
