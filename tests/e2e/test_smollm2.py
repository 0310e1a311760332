"""SmolLM2, a model people know: its greedy tokens are those of the mask, and what it answers when
the answer has left the window."""

import pytest
import torch
from helpers import BOOK, NGRAM, SMOLLM2, CacheReference, Reference

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.evaluation.facts import chat_ids, hide_facts
from vllm_sepllm.kept_ids import resolve_kept

pytestmark = pytest.mark.e2e

KEEP = ["separators", "special", "digits", "capitalized"]
WINDOW, SINKS = 48, 4


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    """In Transformers, float32. It comes with the tokenizer, or the test skips."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)


@pytest.fixture
def kept_ids(smollm2):
    return resolve_kept(SepLLMConfig(keep=KEEP), smollm2).token_ids


@pytest.fixture
def serve(engines):
    """A function: an engine with SmolLM2."""

    def get(sepllm, **options):
        return engines(sepllm=sepllm, model=str(SMOLLM2), memory_mib=256, **options)

    return get


def test_smollm2_turns_of_a_chat(serve, smollm2, smollm2_model, kept_ids):
    """A page of a book is read in turns, with names and numbers kept; each turn computes what is
    new, over kept pages of the turns before."""
    engine = serve({"keep": KEEP, "window_size": WINDOW}, block_size=16, enable_prefix_caching=True)
    reference = Reference(smollm2_model, kept_ids, SINKS, WINDOW)
    lines = BOOK.read_text(encoding="utf-8")[3000:].splitlines()
    messages, read, known = [], 0, 0
    for turn in range(3):
        part = " ".join(lines[6 * turn : 6 * (turn + 1)])
        messages.append(f"{part} What happens?")
        prompt = chat_ids(smollm2, *messages)
        output = engine.generate([prompt], max_tokens=20, ignore_eos=False)[0]
        tokens = list(output.outputs[0].token_ids)
        reference.check(prompt, tokens)
        assert max(0, read - 16) <= output.num_cached_tokens <= known
        messages.append(output.outputs[0].text)
        read, known = len(prompt), len(prompt) + len(tokens)
    assert read > 6 * WINDOW
    engine.check_empty()


def test_smollm2_bound_cache_positions_and_drafts(serve, smollm2, smollm2_model, kept_ids):
    sepllm = {"keep": KEEP, "window_size": WINDOW, "max_separator_tokens": 30}
    engine = serve({**sepllm, "position_mode": "cache"}, speculative_config=NGRAM)
    reference = CacheReference(smollm2_model, kept_ids, SINKS, WINDOW, bound=30)
    counts = engine.count_drafts()
    verse = "One is Anna, two is Boris, three is Clara, four is David. "
    message = f"{BOOK.read_text(encoding='utf-8')[3000:3600]} {4 * verse}Go on."
    prompt = chat_ids(smollm2, message)
    [tokens] = engine.tokens([prompt], max_tokens=32)
    reference.check(prompt, tokens)
    assert counts["drafted"] > counts["accepted"] > 0
    engine.check_empty()


def test_smollm2_answers(serve, smollm2):
    """Numbers, names and words 300 and 600 tokens back: full attention knows them, and so does the
    preset "facts". Separators do not hold them."""
    book = smollm2.encode(BOOK.read_text(encoding="utf-8"), add_special_tokens=False)
    document = hide_facts(book, smollm2, seed=0, distances=(300, 600))
    asked = [(fact, document.prompt(smollm2, fact)) for fact in document.facts]
    right = {}
    for name, sepllm in (
        ("full", None),
        ("facts", {"preset": "facts"}),
        ("separators", {}),
    ):
        engine = serve(sepllm, max_num_batched_tokens=512, enable_prefix_caching=True)
        outputs = engine.generate([prompt for _, prompt in asked], max_tokens=7, ignore_eos=False)
        replies = [output.outputs[0].text for output in outputs]
        right[name] = sum(
            fact.is_right(reply) for (fact, _), reply in zip(asked, replies, strict=True)
        )
    assert len(asked) == 6
    assert right["full"] >= 5
    assert right["facts"] >= 5
    assert right["separators"] <= 1
